"""`deepclust cluster images=DIR num_clusters=K`: a folder of images to clusters, pictures and a model.

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

from deepclust.clustering.number_of_clusters import ClusterNumberEstimate
from deepclust.commands.cluster_model import write_model
from deepclust.commands.cluster_network import (
    choose_network,
    compose_network_config,
    describe_images,
    read_features_key,
    train_network,
    write_features,
)
from deepclust.commands.cluster_runs import cluster_features, configure_clustering
from deepclust.config.build import build
from deepclust.datasets.dataset_checks import estimate_num_clusters
from deepclust.datasets.image_sources import ImageSet
from deepclust.engine.output_files import write_text
from deepclust.errors import InputError
from deepclust.runs.folder import acquire_run_lock, check_run_files
from deepclust.runs.hydra_files import write_hydra_files
from deepclust.runs.results import read_results
from deepclust.runs.summary import print_summary

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> dict[str, Any]:
    """Cluster a folder of images into Hydra's folder and return the content of results.json."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with acquire_run_lock(folder):
        write_hydra_files(folder, cfg, replace=True)
        results = cluster(cfg, folder)
    print_summary(results, folder)
    print(f"{results['trust']['message']}; whether they are what you look for, only a look at report.html tells")
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
        seed: cluster_features(features, cfg, rule, num_clusters, seed, name=root.name, folder=folder) for seed in seeds
    }
    results = read_results(folder)
    if results is not None and (results["run"], results["trust"]["seeds"]) == (str(runs[cfg.seed]), list(seeds)):
        log.info("%s is finished already; nothing to do", folder)
        return results
    return write_model(cfg, folder, images, network_cfg, network_run, features, runs, estimate)


def check_request(cfg: DictConfig, folder: Path, root: Path) -> None:
    """Refuse what cannot be done before anything is begun.

    Raises:
        InputError: naming the key to change.
    """
    if cfg.num_clusters != "auto" and not (isinstance(cfg.num_clusters, int) and cfg.num_clusters > 0):
        raise InputError(
            f"num_clusters is {cfg.num_clusters}", expected="a whole number above 0, or auto", do="set num_clusters"
        )
    if cfg.rule not in (None, "lnscc", "kmeans"):
        raise InputError(f"rule is {cfg.rule}", expected="lnscc, kmeans or null", do="set rule")
    if cfg.num_seeds < 1:
        raise InputError(f"num_seeds is {cfg.num_seeds}", expected="1 or more", do="set num_seeds")
    if not root.is_dir():
        raise InputError(
            f"{root} is {'no folder' if root.exists() else 'missing'}",
            expected="a folder of images",
            do="set images=DIR",
        )
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
            f"{cfg.images} holds {len(images.fit)} images that can be read, and num_clusters is {cfg.num_clusters}",
            expected=f"{least} images at least",
            do="add images" if len(images.fit) < 2 else f"set num_clusters to a {smaller}number, or add images",
        )


def estimate_from_features(cfg: DictConfig, features: Path) -> ClusterNumberEstimate:
    """Estimate how many clusters the features hold, once for these features and this seed: number.json keeps it."""
    file, key = features / "number.json", [read_features_key(features), cfg.seed]
    saved = json.loads(file.read_text()) if file.is_file() else {}
    if saved.get("key") == key:
        curves = {name: [(k, value) for k, value in curve] for name, curve in saved["curves"].items()}
        return ClusterNumberEstimate(saved["num_clusters"], saved["named"], curves)
    log.info("estimating the number of clusters from the features")
    source = configure_clustering(cfg, features).dataset.source
    estimate = estimate_num_clusters(build(source), seed=cfg.seed)
    write_text(file, json.dumps(asdict(estimate) | {"key": key}))
    return estimate
