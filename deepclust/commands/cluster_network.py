"""The network of `deepclust cluster` at work: trained on the images themselves where it is not ready-made; features."""

import json
import logging
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, open_dict

from deepclust.commands import features as features_command
from deepclust.commands.cluster_input import describe_array_source
from deepclust.commands.network_choice import Network
from deepclust.commands.photo_features import PhotoFiles, write_photo_features
from deepclust.commands.time_forecast import foretell_time
from deepclust.commands.train import run
from deepclust.config.early_input_checks import FOLDER_SOURCE
from deepclust.config.plain_values import resolve_to_dict
from deepclust.datasets.dataset_checks import infer_dataset_values
from deepclust.datasets.decoding_processes import count_free_processes
from deepclust.datasets.image_sources import ImageSet
from deepclust.datasets.input_paths import ARRAY_SUFFIXES
from deepclust.engine.plurals import format_count
from deepclust.runs.checkpoint import load_checkpoint
from deepclust.runs.results import read_results
from deepclust.runs.resume_checks import flatten_recipe
from deepclust.runs.run_folder import CHECKPOINT
from deepclust.runs.trusted_targets import list_trusted, open_run_config, read_run_config

log = logging.getLogger(__name__)

MIN_STORED_SIZE = 96  # pixels a side in which images are stored at least, so that the report shows something
# Keys of a recipe that say where the images lie, not which images they are.
LOCATION_KEYS = ("dataset.name", "dataset.path", "dataset.source.")


def describe_images(cfg: DictConfig, network: Network, root: Path, folder: Path) -> dict[str, Any]:
    """Return the section `dataset` of the configuration for the images as that network takes them."""
    dataset = resolve_to_dict(cfg)["dataset"] | network.scale
    size = dataset["image_size"] or network.image_size
    stored_size = dataset["source"]["image_size"] or max(size, MIN_STORED_SIZE)
    stem = dataset["stem"] or (
        "imagenet" if network.is_trained or size >= 128 else "cifar" if size <= 32 else "cifar_pool"
    )
    source = dataset["source"] | {
        "path": str(root),
        "image_size": stored_size,
        "data_dir": cfg.data_dir or f"{folder}/data",
    }
    described = dataset | {
        "name": name_of(root),
        "path": str(root),
        "image_size": size,
        "stored_size": stored_size,
        "stem": stem,
        "source": source,
    }
    return described | (describe_array_source(root, described) if root.suffix in ARRAY_SUFFIXES else {})


def name_of(root: Path) -> str:
    """Return what images are called: the name of their folder, or of their file without its ending."""
    return root.name if root.is_dir() else root.stem


def compose_for_cluster(
    cfg: DictConfig, command: str, *overrides: str, dataset: dict[str, Any] | None = None
) -> DictConfig:
    """Return the configuration of another command, on the hardware and with the seed of this one."""
    composed = compose(command, overrides=list(overrides))
    composed.seed = cfg.seed
    if command == "train":
        composed.hardware = cfg.hardware
    if dataset is not None:
        with open_dict(composed):
            composed.dataset = dataset
    return composed


def train_network(cfg: DictConfig, network: Network, dataset: dict[str, Any], images: ImageSet, folder: Path) -> Path:
    """Train a network on these images and no others, unless that is done already; return its run folder."""
    run_cfg = configure_network_training(cfg, network, dataset, num_images=len(images.fit))
    recipe = flatten_recipe(resolve_to_dict(run_cfg))
    made_of = {key: value for key, value in recipe.items() if not key.startswith(LOCATION_KEYS)}
    made_of |= {"epochs": run_cfg.trainer.max_epochs, "images": features_command.fingerprint(images.fit)}
    run_folder = folder / f"network-{make_key(made_of)}"
    if read_results(run_folder) is None:
        epochs, num_images = format_count(run_cfg.trainer.max_epochs, "epoch"), format_count(len(images.fit), "image")
        log.info("training it for %s of %s", epochs, num_images)
        run_or_resume(run_cfg, run_folder)
    return run_folder


def configure_network_training(
    cfg: DictConfig, network: Network, dataset: dict[str, Any], *, num_images: int
) -> DictConfig:
    """Return the configuration of `deepclust train` that trains the network without labels: SCAN's pretext."""
    overrides = [
        *("method=scan_pretext", "views=simclr", "backbone=conv_small", "dataset=folder"),
        "~callbacks.evaluation",
    ]
    unlabelled = dataset | {"labelled": False, "source": dataset["source"] | {"labelled": False}}
    if "labelled" not in dataset["source"]:
        del unlabelled["source"]["labelled"]
    run_cfg = compose_for_cluster(cfg, "train", *overrides, dataset=unlabelled)
    changes = cfg.own_network.copy()
    if network.backbone is not None:
        run_cfg.backbone = network.backbone
        with open_dict(changes):
            del changes.backbone
    run_cfg.merge_with(changes)
    batch_size = min(run_cfg.batch_size, num_images)
    run_cfg.method.optimizer.lr *= batch_size / run_cfg.batch_size
    run_cfg.batch_size = batch_size
    epochs = max(cfg.min_epochs, round(cfg.images_seen / num_images))
    run_cfg.trainer.max_epochs = run_cfg.trainer.max_epochs or epochs
    run_cfg.report.map_points = 0
    run_cfg.names.method, run_cfg.names.backbone = "scan_pretext", network.name
    return run_cfg


def run_or_resume(run_cfg: DictConfig, run_folder: Path) -> None:
    """Run, or go on with, a training in `run_folder`, whose name tells what it is made of.

    It begins anew where one that was killed read its data elsewhere.
    """
    if (run_folder / CHECKPOINT).exists():
        data_path = read_run_config(load_checkpoint(run_folder))["dataset"].get("path")
        if data_path != run_cfg.dataset.path:
            (run_folder / CHECKPOINT).unlink()  # the run would refuse to go on from it
    run_folder.mkdir(parents=True, exist_ok=True)
    run(run_cfg, run_folder)


def compose_network_config(
    cfg: DictConfig, network: Network, dataset: dict[str, Any], images: ImageSet, network_run: Path | None
) -> DictConfig:
    """Return the configuration (of `deepclust train`) of the network on these images.

    `network_run` is the run of a network trained on these images, None for a ready-made one.
    """
    if network_run is None:
        overrides = ["dataset=folder", "views=propos", "backbone=identity"]
        network_cfg = compose_for_cluster(cfg, "train", *overrides, dataset=dataset)
        network_cfg.backbone = network.backbone
        network_cfg.names.backbone = network.name
    else:
        network_cfg = open_run_config(load_checkpoint(network_run), trust=list_trusted(cfg))
        network_cfg.dataset = dataset
    network_cfg.dataset.update(infer_dataset_values(network_cfg.dataset, images))
    return network_cfg


def write_features(cfg: DictConfig, network_cfg: DictConfig, network_run: Path | None, folder: Path) -> Path:
    """Write the features of all images, unless they are there already; return their folder."""
    dataset = resolve_to_dict(network_cfg)["dataset"]
    if network_run is None:
        features_cfg = configure_features(cfg, network_cfg.backbone, dataset, folder)
    else:
        features_cfg = compose_for_cluster(cfg, "features", "run=DIR", dataset=dataset)
        features_cfg.run = str(network_run)
        features_cfg.trust = list_trusted(cfg)
        name_output(features_cfg, cfg, folder)
    return features_command.main(features_cfg)


def configure_features(cfg: DictConfig, backbone: Any, dataset: dict[str, Any], folder: Path) -> DictConfig:
    """Return the configuration of `deepclust features` with a ready-made network."""
    features_cfg = compose_for_cluster(cfg, "features", "views=propos", "backbone=identity", dataset=dataset)
    features_cfg.backbone = backbone
    name_output(features_cfg, cfg, folder)
    return features_cfg


def name_output(features_cfg: DictConfig, cfg: DictConfig, folder: Path) -> None:
    """Let features be written into the run folder. Of the images, which are kept elsewhere, there is no copy there."""
    features_cfg.output = str(folder / "features")
    features_cfg.batch_size = cfg.batch_size
    features_cfg.accelerator = cfg.hardware.accelerator
    features_cfg.max_pictures = 0


def are_decoded_once(cfg: DictConfig, network: Network, dataset: dict[str, Any]) -> bool:
    """Return whether photos are decoded as they are read: where no network is trained on them and no copy is wanted."""
    source = dataset["source"]
    is_folder_of_squares = source["_target_"] == FOLDER_SOURCE and source["keep"] == "central_squares"
    return network.is_trained and not cfg.keep_images and is_folder_of_squares and source["image_size"] != "original"


def write_features_of_photos(
    cfg: DictConfig, network: Network, dataset: dict[str, Any], photos: PhotoFiles, folder: Path
) -> ImageSet:
    """Write the features of photos by a ready-made network, decoding them as they are read; return the images."""
    return write_photo_features(
        configure_features(cfg, network.backbone, dataset, folder),
        photos,
        folder / "features",
        num_processes=count_free_processes() if cfg.decoding_processes is None else cfg.decoding_processes,
        thumbnail_side=cfg.thumbnail_size,
        on_first_block=lambda features, seconds: log.info(
            foretell_time(cfg, features, seconds_per_image=seconds, num_images=len(photos.files))
        ),
    )


def make_key(made_of: Any) -> str:
    """Return a short name for what is made of that: the first digits of its SHA-256."""
    return sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:8]


def read_features_key(features: Path) -> str:
    """Return the checksum of what the features in a folder, which are complete, were made of."""
    key = features_command.read_made_by(features)
    assert key is not None
    return key
