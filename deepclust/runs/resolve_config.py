"""The configuration of a run, resolved: what the user left open is filled in, in one step, before anything is built."""

import copy
import logging
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from deepclust.clustering.number_of_clusters import ClusterNumberEstimate
from deepclust.config.targets import locate_target
from deepclust.datasets.dataset_checks import (
    check_num_clusters,
    estimate_num_clusters,
    infer_dataset_values,
    warn_of_offset,
)
from deepclust.datasets.image_sources import ImageSet
from deepclust.engine.cpu_threads import choose_num_threads, describe_num_threads
from deepclust.engine.devices import count_devices, select_device
from deepclust.engine.plurals import format_count
from deepclust.errors import InputError
from deepclust.runs.batch_size import lower_batch_size

log = logging.getLogger(__name__)


def record_choices(cfg: DictConfig) -> DictConfig:
    """Return the configuration with the names of the chosen options and the overrides, which only Hydra knows."""
    hydra = HydraConfig.get()
    cfg = copy.deepcopy(cfg)
    for group in cfg.names:
        cfg.names[group] = cfg.names[group] or hydra.runtime.choices[group]
    cfg.overrides = list(hydra.overrides.task)
    return cfg


def resolve_config(
    cfg: DictConfig,
    images: ImageSet,
    earlier: dict[str, Any] | None,
    saved_config: dict[str, Any] | None = None,
) -> tuple[DictConfig, ClusterNumberEstimate | None]:
    """Return the configuration with every open value filled in.

    `earlier` describes the run that this one starts from (`describe_earlier_run`), and `saved_config` is what an
    interrupted start of this run was resolved to. With `dataset.num_clusters=auto` the number of clusters is estimated,
    and the estimate is returned too, unless the method finds the number itself.

    Raises:
        InputError: if the configuration contradicts the images; it names the key to change.
    """
    cfg = copy.deepcopy(cfg)
    if earlier is not None:
        cfg.earlier = earlier
    cfg.hardware.devices = count_devices(cfg.hardware.accelerator, cfg.hardware.devices)
    with open_dict(cfg.dataset):  # value_ranges need not be there
        cfg.dataset.update(infer_dataset_values(cfg.dataset, images))
    if cfg.trainer.max_epochs:
        warn_of_offset(cfg.dataset, images)
    estimate = None
    if cfg.dataset.num_clusters == "auto" and not finds_num_clusters(cfg):
        estimate = estimate_num_clusters(images, seed=cfg.seed)
        log.info(estimate.summarize())
        cfg.dataset.num_clusters = estimate.require_several_clusters("dataset.num_clusters")
    if cfg.dataset.num_clusters != "auto":
        check_num_clusters(cfg.dataset.num_clusters, num_images=len(images.fit))
    check_evaluated_images(cfg, images)
    check_processes_have_images(cfg, images)
    lower_batch_size(cfg, len(images.fit))
    with open_dict(cfg.hardware):  # a configuration of the user need not have the key
        cfg.hardware.threads = resolve_num_threads(cfg, saved_config)
    return cfg, estimate


def finds_num_clusters(cfg: DictConfig) -> bool:
    """Return whether the method of a configuration finds the number of clusters itself."""
    return bool(getattr(locate_target(cfg.method._target_, "method._target_"), "finds_num_clusters", False))


def check_evaluated_images(cfg: DictConfig, images: ImageSet) -> None:
    """Check that a transductive method is evaluated on the images that it is trained on.

    Raises:
        InputError: if not.
    """
    method = locate_target(cfg.method._target_, "method._target_")
    if getattr(method, "is_transductive", False) and images.evaluation is not images.fit:
        raise InputError(
            f"the data set evaluates other images than it trains on, and {method.__name__} clusters these only",
            expected="the same images for both",
            do="set dataset.source.evaluate=null"
            if "evaluate" in cfg.dataset.source
            else "take the files of the split test out of the folder",
        )


def resolve_num_threads(cfg: DictConfig, saved_config: dict[str, Any] | None) -> int:
    """Return the number of threads on the CPU, and say what was chosen.

    A run that goes on takes what it began with, for the number decides on the last bits of sums. With a GPU, or with
    several processes, the threads are left as they are.
    """
    setting = cfg.hardware.get("threads", "auto")
    num_processes = cfg.hardware.devices * cfg.hardware.num_nodes
    num_threads = torch.get_num_threads()
    if setting != "auto" or (num_processes == 1 and select_device(cfg.hardware.accelerator).type == "cpu"):
        num_views = cfg.batch_size * len(cfg.view_names)
        saved = (saved_config or {}).get("hardware") or {}
        num_threads = choose_num_threads(
            setting,
            values_in_batch=num_views * cfg.dataset.channels * (cfg.dataset.image_size or 1) ** 2,
            recorded=saved.get("threads") if isinstance(saved.get("threads"), int) else None,
        )
        if message := describe_num_threads(num_threads, setting):
            log.info(message)
    return num_threads


def check_processes_have_images(cfg: DictConfig, images: ImageSet) -> None:
    """Check that every process has an image to train on and one to evaluate.

    Raises:
        InputError: if there are fewer images than processes.
    """
    num_processes = cfg.hardware.devices * cfg.hardware.num_nodes
    num_images = min(len(images.fit), len(images.evaluation))
    if num_images < num_processes:
        raise InputError(
            f"there are only {format_count(num_images, 'image')} for {num_processes} processes",
            expected="an image for each process at least",
            do=f"set hardware.devices to {max(1, num_images // cfg.hardware.num_nodes)} or fewer",
        )
