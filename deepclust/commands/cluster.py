"""`deepclust cluster images=DIR num_clusters=K`: images or vectors to clusters, pictures and a model.

Every step leaves a folder of its own in the run folder, and what is complete is not made again:

    data/               the images, decoded: where a network is trained on them, or with keep_images=true
    network-KEY/        a network trained on these images, where no other is to be had: a run of `deepclust train`
    features/           the features: a data set for `deepclust train dataset=features dataset.path=...`; thumbnails
    clusters/KEY/       a run for each rule, number of clusters and seed; LNSCC's first stage knows of no number
    report.html, assignments.csv, results.json, checkpoints/last.ckpt   the result of the latest call
    numbers/K/          the same for further numbers of clusters, where several are asked for, or auto is unsure
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

from deepclust.clustering.backend import clustering_settings
from deepclust.clustering.number_of_clusters import MEASURES, ClusterNumberEstimate
from deepclust.commands.cluster_findings import describe_what_is_shown
from deepclust.commands.cluster_input import holds_vectors, write_vectors_as_features
from deepclust.commands.cluster_model import write_model
from deepclust.commands.cluster_network import (
    are_decoded_once,
    compose_network_config,
    describe_images,
    name_of,
    read_features_key,
    train_network,
    write_features,
    write_features_of_photos,
)
from deepclust.commands.cluster_numbers import choose_folder, list_numbers, write_tabbed_report
from deepclust.commands.cluster_runs import cluster_features, configure_clustering, list_clustering_changes
from deepclust.commands.cluster_sorting import check_sorting, sort_clustered
from deepclust.commands.network_choice import choose_network
from deepclust.commands.photo_features import find_photos
from deepclust.config.build import build
from deepclust.datasets.dataset_checks import estimate_num_clusters
from deepclust.datasets.image_sources import ImageSet
from deepclust.datasets.input_paths import check_images_or_vectors
from deepclust.engine.devices import check_accelerator
from deepclust.engine.output_files import write_text
from deepclust.engine.plurals import format_count
from deepclust.engine.run_status import heartbeats_written, run_state_recorded
from deepclust.engine.small_files import read_state
from deepclust.errors import InputError
from deepclust.runs.hydra_files import write_hydra_files
from deepclust.runs.names_json import read_names
from deepclust.runs.results import read_latest_results, read_results
from deepclust.runs.run_folder import acquire_run_lock, check_run_files
from deepclust.runs.summary import print_summary

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> dict[str, Any]:
    """Cluster images or vectors into Hydra's folder and return the content of results.json."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with (
        clustering_settings(**cfg.clustering),
        acquire_run_lock(folder),
        run_state_recorded(folder),
        heartbeats_written(folder),
    ):
        write_hydra_files(folder, cfg, replace=True)
        results = cluster(cfg, folder)
    print_summary(results, folder)
    print(f"{results['trust']['message']}; whether they are what you look for, only a look at report.html tells")
    if results.get("number") and (doubt := results["number"].get("doubt")):
        print(doubt if len(results["number"]["candidates"]) == 1 else f"{doubt}: report.html has a tab for each")
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
        check_num_images(cfg, len(images.evaluation))
    else:
        network = choose_network(cfg)
        log.info(network.message)
        dataset = describe_images(cfg, network, root, folder)
        if are_decoded_once(cfg, network, dataset):
            with cures_named_for_this_command():
                photos = find_photos(dataset)
                check_num_images(cfg, len(photos.files))
                images = write_features_of_photos(cfg, network, dataset, photos, folder)
            check_num_images(cfg, len(images.fit))
            network_cfg = compose_network_config(cfg, network, dataset, images, None)
            features = folder / "features"
        else:
            with cures_named_for_this_command():
                images = build(dataset["source"])
            check_num_images(cfg, len(images.fit))
            network_run = None if network.is_trained else train_network(cfg, network, dataset, images, folder)
            network_cfg = compose_network_config(cfg, network, dataset, images, network_run)
            features = write_features(cfg, network_cfg, network_run, folder)
    numbers, estimate = list_numbers(cfg.num_clusters), None
    if numbers == ["auto"]:
        estimate = estimate_from_features(cfg, features)
        log.info(estimate.summarize())
        estimate.require_several_clusters("num_clusters")
        # The likeliest first. Where the number is unsure, others stand beside it.
        numbers = [candidate.num_clusters for candidate in estimate.candidates]
        if len(numbers) > 1:
            log.info("that is unsure, so each of these numbers gets a tab: %s", ", ".join(map(str, numbers)))
        cfg = cfg.copy()
        cfg.num_clusters = numbers

    def write_number(number: int) -> dict[str, Any]:
        place = choose_folder(folder, numbers, number)
        place.mkdir(parents=True, exist_ok=True)
        given = (root, images, network_cfg, network_run, features)
        return cluster_into(cfg, folder, place, number, *given, estimate if number == numbers[0] else None)

    others = {number: write_number(number) for number in numbers[1:]}
    results = write_number(numbers[0])  # the last: where its results are, all are complete
    write_tabbed_report(folder, numbers, title=f"{name_of(root)}: {', '.join(map(str, numbers))} clusters")
    for number, result in others.items():
        print(f"{number} clusters, in {choose_folder(folder, numbers, number)}: {result['trust']['message']}")
    if cfg.sort_to is not None:
        sort_clustered(cfg, folder, images.paths or [])
    return results


def cluster_into(
    cfg: DictConfig,
    folder: Path,
    place: Path,
    num_clusters: int,
    root: Path,
    images: ImageSet,
    network_cfg: DictConfig | None,
    network_run: Path | None,
    features: Path,
    estimate: ClusterNumberEstimate | None,
) -> dict[str, Any]:
    """Make one number of clusters of the features and write the result into the run folder `place`.

    `folder` is that of the command, which keeps the clusterings; for the rest see `write_model`.
    """
    num_fitted = min(len(images.fit), cfg.max_fitted)
    rule = cfg.rule or ("lnscc" if num_fitted >= 10 * num_clusters else "kmeans")
    seeds = range(cfg.seed, cfg.seed + cfg.num_seeds)
    runs = {
        seed: cluster_features(features, cfg, rule, num_clusters, seed, name=name_of(root), folder=folder)
        for seed in seeds
    }
    results = read_results(place)
    if results is not None and is_result_of(results, runs[cfg.seed], list(seeds), cfg):
        log.info("%s is finished already; nothing to do", place)
        return results
    return write_model(cfg, place, root, images, network_cfg, network_run, features, runs, estimate)


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
    numbers = list_numbers(cfg.num_clusters)
    if numbers != ["auto"] and not all(isinstance(number, int) and number > 0 for number in numbers):
        raise InputError(
            f"num_clusters is {cfg.num_clusters}",
            expected="a whole number above 0, several of them, or auto",
            do="set num_clusters",
        )
    if numbers != ["auto"] and max(numbers) > cfg.max_fitted:
        raise InputError(
            f"num_clusters is {max(numbers)}, and {cfg.max_fitted} images at most are fitted",
            expected="several fitted images for each cluster",
            do=f"set max_fitted={10 * max(numbers)}",
        )
    check_accelerator(cfg.hardware.accelerator, key="hardware.accelerator")
    if cfg.rule not in (None, "lnscc", "kmeans"):
        raise InputError(f"rule is {cfg.rule}", expected="lnscc, kmeans or null", do="set rule")
    if cfg.num_seeds < 1:
        raise InputError(f"num_seeds is {cfg.num_seeds}", expected="1 or more", do="set num_seeds")
    check_images_or_vectors(root)
    check_sorting(cfg, root)
    read_names(folder)  # it may have been edited, and is read again at the end
    earlier = read_latest_results(folder)
    if earlier is not None and earlier.get("images") != str(root):
        raise InputError(
            f"{folder} holds the clusters of {earlier.get('images', 'something else')}",
            expected=f"those of {root}, or an empty folder",
            do="set hydra.run.dir=DIR",
        )


@contextmanager
def cures_named_for_this_command() -> Iterator[None]:
    """Let an InputError about the images name this command's key `images`."""
    try:
        yield
    except InputError as error:  # it names the key of `deepclust train`
        cure = error.do.replace("dataset.path", "images")
        raise InputError(error.what, expected=error.expected, do=cure) from error


def check_num_images(cfg: DictConfig, num_images: int) -> None:
    """Refuse a single image, or fewer images than clusters.

    Raises:
        InputError: naming the key to change.
    """
    numbers = list_numbers(cfg.num_clusters)
    least = 20 if numbers == ["auto"] else max(2, *numbers)
    if num_images < least:
        smaller = "" if cfg.num_clusters == "auto" else "smaller "
        raise InputError(
            f"{cfg.images} holds {format_count(num_images, 'image')} that can be read, "
            f"and num_clusters is {cfg.num_clusters}",
            expected=f"{least} images at least",
            do="add images" if num_images < 2 else f"set num_clusters to a {smaller}number, or add images",
        )


def estimate_from_features(cfg: DictConfig, features: Path) -> ClusterNumberEstimate:
    """Estimate how many clusters the features hold, once for these features and this seed: number.json keeps it."""
    file = features / "number.json"
    key = [read_features_key(features), cfg.seed, *MEASURES, *list_clustering_changes(cfg)]
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
