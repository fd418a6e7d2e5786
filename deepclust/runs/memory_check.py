"""A training on the CPU that cannot fit into the memory is refused before it fills it."""

import copy
import logging

import torch
from omegaconf import DictConfig

from deepclust.config.build import build
from deepclust.engine.devices import select_device
from deepclust.engine.memory_estimate import measure_saved_bytes, read_available_bytes
from deepclust.errors import InputError

log = logging.getLogger(__name__)

VALUES_OF_LARGE_BATCH = 2**22  # of all images of a batch together; smaller ones fit, and the check would take time


def check_memory(cfg: DictConfig) -> None:
    """Check that one view of a batch fits into the memory that is left, as far as the backbone tells.

    With a GPU nothing is checked: its own errors come at the first batch.

    Raises:
        InputError: if it does not; it names a batch size that does.
    """
    values = cfg.batch_size * cfg.dataset.channels * (cfg.dataset.image_size or 1) ** 2
    if values < VALUES_OF_LARGE_BATCH or cfg.trainer.max_epochs == 0:
        return
    if select_device(cfg.hardware.accelerator).type != "cpu":
        return
    available, needed_by_image = read_available_bytes(), estimate_bytes_of_image(cfg)
    if available is None or needed_by_image is None:
        return
    num_processes = cfg.hardware.devices
    needed = needed_by_image * -(-cfg.batch_size // (num_processes * cfg.hardware.num_nodes)) * num_processes
    if needed > available:
        fitting = max(2, int(cfg.batch_size * available / needed / len(cfg.view_names)))
        raise InputError(
            f"a batch of {cfg.batch_size} images of {cfg.dataset.image_size} x {cfg.dataset.image_size} pixels needs "
            f"more than {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are left",
            expected="a batch that fits into the memory",
            do=f"set batch_size={fitting} or less, or a smaller network and images: "
            "backbone=conv_small dataset.image_size=32",
        )


def estimate_bytes_of_image(cfg: DictConfig) -> int | None:
    """Return the bytes that the backbone keeps of an image for the backward pass; None where it cannot be told."""
    size = cfg.dataset.image_size or 1
    try:
        with torch.random.fork_rng(devices=[]):
            network = copy.deepcopy(build(cfg.backbone))  # what a Python program has handed over stays as it is
            return measure_saved_bytes(network, (cfg.dataset.channels, size, size))
    except Exception as error:  # whatever it is, the training meets it and says so in its own words
        log.debug("the memory that a batch needs is not known: %s", error)
        return None
