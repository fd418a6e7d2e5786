"""The recipe of a run, what decides on what is learned: a run goes on only with the recipe that it began with."""

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, open_dict

from deepclust.clustering.backend import ClusteringSettings
from deepclust.config.composition import read_defaults
from deepclust.config.override_format import format_override, format_value
from deepclust.errors import InputError
from deepclust.runs.batch_size import fit_batch_size
from deepclust.runs.trusted_targets import read_run_config, shorten

log = logging.getLogger(__name__)

MAX_LENGTH_OF_ADVICE = 120  # characters; the value of a longer one is not spelt out
RECIPE_KEYS = (
    *("seed", "dataset", "backbone", "batch_size", "views", "view_names", "multi_view"),
    *("drop_last", "sync_batchnorm", "batch_norm_groups", "method"),
)
# Where decoded images are kept, and the largest file that is read: num_images tells whether one was left out.
FILE_KEYS = ("data_dir", "max_megapixels")
# Arguments of the trainer that change nothing in what is learned, or are meant to change: a run may go on for longer.
TRAINER_KEYS_NOT_IN_RECIPE = (
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "benchmark", "deterministic"),
    *("max_epochs", "max_steps", "max_time", "num_sanity_val_steps", "use_distributed_sampler", "log_every_n_steps"),
    *("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger", "callbacks", "profiler"),
)
# Keys of `dataset` that may be left open (null or auto): they are filled in once the images are known.
OPEN_DATASET_KEYS = ("name", "num_images", "channels", "image_size", "num_classes", "num_clusters", "value_ranges")


def fill_open_values(cfg: DictConfig, checkpoint: dict[str, Any]) -> DictConfig:
    """Return the configuration of a run with what it leaves open filled in from the finished run that it may be.

    Raises:
        InputError: if the checkpoint holds no configuration.
    """
    saved, cfg = read_run_config(checkpoint), copy.deepcopy(cfg)
    with open_dict(cfg):
        for key in OPEN_DATASET_KEYS:
            if key in saved["dataset"] and cfg.dataset.get(key) in (None, "auto"):
                cfg.dataset[key] = saved["dataset"][key]
        if isinstance(saved["dataset"].get("num_images"), int):
            cfg.batch_size = fit_batch_size(cfg, saved["dataset"]["num_images"])
        if cfg.trainer.get("max_steps") is not None:  # it has lowered max_epochs, over which schedules are stretched
            cfg.trainer.max_epochs = saved["trainer"]["max_epochs"]
        if cfg.earlier.sha256 is None:
            cfg.earlier.sha256 = saved["earlier"].get("sha256")
    return cfg


def check_same_recipe(saved_config: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint that another recipe made; `saved_config` is the configuration in it.

    Raises:
        InputError: naming the first key that differs.
    """
    saved, current = select_recipe(saved_config), select_recipe(config)
    for recipe in (saved, current):  # in full, so that the advice names values and not null
        recipe["clustering"] = read_defaults("clustering") | recipe["clustering"]
    for key, saved_value, current_value in find_differences(saved, current):
        advice = f"set {format_override(key, saved_value)}"
        if key.startswith("earlier"):
            advice = "give the same start=DIR"
        elif "sha256" in key:
            advice = "hand over the network with the weights that it had when the run began"
        elif len(advice) > MAX_LENGTH_OF_ADVICE:
            advice = f"give the same {key}"
        saved_text, current_text = (shorten(format_value(value)) for value in (saved_value, current_value))
        raise InputError(
            f"the checkpoint in this folder was made with {key}={saved_text}, this run has {current_text}",
            expected="the same recipe when a run goes on",
            do=f"{advice}, or start in another folder (hydra.run.dir=DIR)",
        )


def warn_of_other_seeding(saved_config: dict[str, Any], config: dict[str, Any]) -> None:
    """Say so where a run from before there was `clustering` goes on, and its k-means is seeded otherwise by now."""
    dataset = config["dataset"]
    num_rows, num_clusters = dataset["num_images"], dataset["num_clusters"]
    if "clustering" not in saved_config and isinstance(num_clusters, int):
        num_seeding_rows = ClusteringSettings(**config["clustering"]).num_seeding_rows(num_rows, num_clusters)
        if num_seeding_rows < num_rows:
            log.warning(
                "this run began when k-means chose its first centroids among all rows; from now on it does so among %s "
                "of %s (clustering.seeding_rows_per_cluster): for the same throughout, start in another folder",
                f"{num_seeding_rows:,}",
                f"{num_rows:,}",
            )


def find_differences(saved: Any, current: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, saved value, current value) where two nested sections differ; a missing key counts as null.

    Lists of one length are compared entry by entry, others as a whole.
    """
    if isinstance(saved, dict) and isinstance(current, dict):
        for name in [*saved, *(name for name in current if name not in saved)]:
            key = f"{prefix}.{name}" if prefix else str(name)
            yield from find_differences(saved.get(name), current.get(name), key)
    elif isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
        for index, (then, now) in enumerate(zip(saved, current, strict=True)):
            yield from find_differences(then, now, f"{prefix}.{index}")
    elif saved != current and not (saved != saved and current != current):  # two nan are the same setting
        yield prefix, saved, current


def select_recipe(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that decides on what is learned, as nested sections."""
    recipe = {name: config.get(name) for name in RECIPE_KEYS}
    recipe["earlier"] = {"sha256": config["earlier"].get("sha256")}  # wherever that run's folder lies by now
    recipe["trainer"] = {
        name: value for name, value in config["trainer"].items() if name not in TRAINER_KEYS_NOT_IN_RECIPE
    }
    recipe["hardware"] = {"precision": config["hardware"].get("precision")}
    recipe["clustering"] = select_clustering_changes(config.get("clustering") or {})
    dataset = without_file_keys(recipe["dataset"] or {})
    if isinstance(dataset.get("source"), dict):
        dataset["source"] = without_file_keys(dataset["source"])
    recipe["dataset"] = dataset or recipe["dataset"]
    return recipe


def select_clustering_changes(clustering: Mapping[str, Any]) -> dict[str, Any]:
    """Return what differs from the default in a section `clustering`, so that older runs without one are as usual."""
    usual = read_defaults("clustering")
    return {name: value for name, value in clustering.items() if value != usual[name]}


def without_file_keys(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section without the keys of FILE_KEYS, which say how files are kept and read."""
    return {key: value for key, value in section.items() if key not in FILE_KEYS}


def flatten_recipe(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that decides on what is learned, by dotted key; lists are values."""
    return {
        key: value for name, node in select_recipe(config).items() for key, value in flatten_section(node, name).items()
    }


def flatten_section(node: Any, prefix: str) -> dict[str, Any]:
    """Return the leaves of a nested section by dotted key."""
    if isinstance(node, dict):
        return {k: v for name, child in node.items() for k, v in flatten_section(child, f"{prefix}.{name}").items()}
    return {prefix: node}
