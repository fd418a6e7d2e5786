"""`deepclust cluster images=DIR num_clusters=K`: images or vectors to clusters, pictures and a model.

Every step leaves a folder of its own in the run folder, and what is complete is not made again:

    data/               the images, decoded
    network-KEY/        a network trained on these images, where no other is to be had: a run of `deepclust train`
    features/           the features: a data set for `deepclust train dataset=features dataset.path=...`
    clusters/KEY/       a run for each rule, number of clusters and seed; LNSCC's first stage knows of no number
    report.html, assignments.csv, results.json, checkpoints/last.ckpt   the result of the latest call
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pydantic import TypeAdapter, ValidationError

from deepclust.clustering.number_of_clusters import MEASURES, ClusterNumberEstimate
from deepclust.commands.cluster_findings import describe_what_is_shown
from deepclust.commands.cluster_input import holds_vectors, write_vectors_as_features
from deepclust.commands.cluster_model import write_model
from deepclust.commands.cluster_network import (
    compose_network_config,
    describe_images,
    name_of,
    read_features_key,
    train_network,
    write_features,
)
from deepclust.commands.cluster_runs import cluster_features, configure_clustering
from deepclust.commands.network_choice import choose_network
from deepclust.config.build import build
from deepclust.datasets.dataset_checks import estimate_num_clusters
from deepclust.datasets.image_sources import ImageSet
from deepclust.datasets.input_paths import check_images_or_vectors
from deepclust.engine.devices import check_accelerator
from deepclust.engine.output_files import write_text
from deepclust.engine.plurals import format_count
from deepclust.engine.small_files import read_state
from deepclust.errors import InputError
from deepclust.runs.hydra_files import write_hydra_files
from deepclust.runs.names_json import read_names
from deepclust.runs.results import read_results
from deepclust.runs.run_folder import acquire_run_lock, check_run_files
from deepclust.runs.summary import print_summary

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> dict[str, Any]:
    """Cluster images or vectors into Hydra's folder and return the content of results.json."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with acquire_run_lock(folder):
        write_hydra_files(folder, cfg, replace=True)
        results = cluster(cfg, folder)
    print_summary(results, folder)
    print(f"{results['trust']['message']}; whether they are what you look for, only a look at report.html tells")
    if results.get("number") and (doubt := results["number"].get("doubt")):
        print(doubt)
    return results


@contextmanager
def log_messages_once(logger_name: str) -> Iterator[None]:
    """Drop repeated messages of a logger: the steps open the same images again, and broken files stay broken."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message in seen:
            return False
        seen.add(message)
        return True

    logger = logging.getLogger(logger_name)
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


@log_messages_once("deepclust.datasets.folder")
def cluster(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Fill the run folder and return the content of results.json.

    Raises:
        InputError: if what is asked for cannot be done with these images; it names the key to change.
    """
    root = Path(os.path.abspath(Path(cfg.images).expanduser()))
    check_run_files(folder)
    check_request(cfg, folder, root)
    network_cfg = network_run = None
    if holds_vectors(root):  # which are the features, without any network
        log.info("features: the vectors themselves")
        features = write_vectors_as_features(root, folder)
        images = build(configure_clustering(cfg, features).dataset.source)
        check_num_images(cfg, images)
    else:
        network = choose_network(cfg)
        log.info(network.message)
        dataset = describe_images(cfg, network, root, folder)
        images = open_images(dataset)
        check_num_images(cfg, images)
        network_run = None if network.is_trained else train_network(cfg, network, dataset, images, folder)
        network_cfg = compose_network_config(cfg, network, dataset, images, network_run)
        features = write_features(cfg, network_cfg, network_run, folder)
    num_clusters, estimate = cfg.num_clusters, None
    if num_clusters == "auto":
        estimate = estimate_from_features(cfg, features)
        log.info(estimate.summarize())
        num_clusters = estimate.require_several_clusters("num_clusters")

    rule = cfg.rule or ("lnscc" if len(images.fit) >= 10 * num_clusters else "kmeans")
    seeds = range(cfg.seed, cfg.seed + cfg.num_seeds)
    runs = {
        seed: cluster_features(features, cfg, rule, num_clusters, seed, name=name_of(root), folder=folder)
        for seed in seeds
    }
    results = read_results(folder)
    if results is not None and is_result_of(results, runs[cfg.seed], list(seeds), cfg):
        log.info("%s is finished already; nothing to do", folder)
        return results
    return write_model(cfg, folder, root, images, network_cfg, network_run, features, runs, estimate)


def is_result_of(results: dict[str, Any], run: Path, seeds: list[int], cfg: DictConfig) -> bool:
    """Return whether a results.json is that of this run, compared with these seeds and shown as asked for."""
    trust = results.get("trust")
    is_of_run = results.get("run") == str(run) and isinstance(trust, dict) and trust.get("seeds") == seeds
    return is_of_run and results.get("shown") == describe_what_is_shown(cfg)


def check_request(cfg: DictConfig, folder: Path, root: Path) -> None:
    """Refuse what cannot be done before anything is begun.

    Raises:
        InputError: naming the key to change.
    """
    if cfg.num_clusters != "auto" and not (isinstance(cfg.num_clusters, int) and cfg.num_clusters > 0):
        raise InputError(
            f"num_clusters is {cfg.num_clusters}", expected="a whole number above 0, or auto", do="set num_clusters"
        )
    check_accelerator(cfg.hardware.accelerator, key="hardware.accelerator")
    if cfg.rule not in (None, "lnscc", "kmeans"):
        raise InputError(f"rule is {cfg.rule}", expected="lnscc, kmeans or null", do="set rule")
    if cfg.num_seeds < 1:
        raise InputError(f"num_seeds is {cfg.num_seeds}", expected="1 or more", do="set num_seeds")
    check_images_or_vectors(root)
    read_names(folder)  # it may have been edited, and is read again at the end
    earlier = read_results(folder)
    if earlier is not None and earlier.get("images") != str(root):
        raise InputError(
            f"{folder} holds the clusters of {earlier.get('images', 'something else')}",
            expected=f"those of {root}, or an empty folder",
            do="set hydra.run.dir=DIR",
        )


def open_images(dataset: dict[str, Any]) -> ImageSet:
    """Open the images, decoding them if they are new.

    Raises:
        InputError: if there are none; it names this command's key `images`.
    """
    try:
        return build(dataset["source"])
    except InputError as error:  # it names the key of `deepclust train`
        cure = error.do.replace("dataset.path", "images")
        raise InputError(error.what, expected=error.expected, do=cure) from error


def check_num_images(cfg: DictConfig, images: ImageSet) -> None:
    """Refuse a single image, or fewer images than clusters.

    Raises:
        InputError: naming the key to change.
    """
    least = 20 if cfg.num_clusters == "auto" else max(2, cfg.num_clusters)
    if len(images.fit) < least:
        smaller = "" if cfg.num_clusters == "auto" else "smaller "
        raise InputError(
            f"{cfg.images} holds {format_count(len(images.fit), 'image')} that can be read, "
            f"and num_clusters is {cfg.num_clusters}",
            expected=f"{least} images at least",
            do="add images" if len(images.fit) < 2 else f"set num_clusters to a {smaller}number, or add images",
        )


def estimate_from_features(cfg: DictConfig, features: Path) -> ClusterNumberEstimate:
    """Estimate how many clusters the features hold, once for these features and this seed: number.json keeps it."""
    file, key = features / "number.json", [read_features_key(features), cfg.seed, *MEASURES]
    saved = read_state(file, check_estimate, expected="the number of clusters in the features beside it")
    if saved is not None and saved["key"] == key:
        curves = {name: [(k, value) for k, value in curve] for name, curve in saved["curves"].items()}
        return ClusterNumberEstimate(saved["num_clusters"], saved["named"], curves)
    log.info("estimating the number of clusters from the features")
    source = configure_clustering(cfg, features).dataset.source
    estimate = estimate_num_clusters(build(source), seed=cfg.seed)
    write_text(file, json.dumps(asdict(estimate) | {"key": key}))
    return estimate


def check_estimate(content: Any) -> str | None:
    """Return what is wrong with the content of number.json, or None."""
    try:
        TypeAdapter(ClusterNumberEstimate).validate_python(content).summarize()
    except (ValidationError, KeyError):
        return "it holds no estimate"
    return None if isinstance(content.get("key"), list) else "it does not say of what"
