"""The size of a batch where the images are fewer than a method asks for."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from deepclust.engine.plurals import format_count

log = logging.getLogger(__name__)


def must_batches_be_full(values: Mapping[str, Any]) -> bool:
    """Return whether a training with these settings knows no batch that is smaller than `batch_size`."""
    return bool(values.get("drop_last")) and (values.get("trainer") or {}).get("max_epochs") != 0


def is_batch_size_named(batch_size: Any, overrides: Sequence[str]) -> bool:
    """Return whether a command names this size itself, for the run or for the stage before it.

    Then it is meant, and is refused where it is too large; else it is that of a method, which knows of no data set.
    """
    keys = [override.lstrip("+").rpartition("=") for override in overrides]
    return any(key.rpartition("before.")[2] == "batch_size" and value == str(batch_size) for key, _, value in keys)


def fit_batch_size(cfg: DictConfig, num_images: int) -> int:
    """Return the size of a batch: that of the configuration, or as many images as there are, if these are fewer.

    It is divided among the processes and the groups of batch normalisation, so that it is a multiple of their numbers.
    """
    is_named = is_batch_size_named(cfg.batch_size, cfg.get("overrides") or [])
    if num_images >= cfg.batch_size or is_named or not must_batches_be_full(cfg):
        return cfg.batch_size
    devices = cfg.hardware.devices if isinstance(cfg.hardware.devices, int) else 1
    parts = math.lcm(devices * cfg.hardware.num_nodes, cfg.batch_norm_groups)
    return max(num_images // parts, 1) * parts


def lower_batch_size(cfg: DictConfig, num_images: int) -> None:
    """Set the size of a batch to what the images allow, and say so in a line."""
    batch_size = fit_batch_size(cfg, num_images)
    if batch_size < cfg.batch_size:
        log.warning(
            "batch_size is %d in place of %d, for there are %s: the numbers of the method are meant for the larger one",
            *(batch_size, cfg.batch_size, format_count(num_images, "image")),
        )
        cfg.batch_size = batch_size
