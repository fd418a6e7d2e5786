"""How much memory a training needs, told from two images, and how much is left."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

MEMINFO, STATM = Path("/proc/meminfo"), Path("/proc/self/statm")
# Limits of a container, and what it has taken: of version 2 of cgroups, and of version 1.
LIMITS = [
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]


def measure_saved_bytes(network: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return the bytes that the backward pass of one image of a batch keeps, without the weights.

    `image_shape` is (channels, H, W). It is a lower bound of what a training needs for an image: views, heads and
    gradients come to it. The network stays as it is, but for its mode: it is in evaluation mode afterwards.
    """
    network.eval()  # so that no statistics change
    weights = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in weights:
            base = tensor if tensor._base is None else tensor._base
            kept[id(base)] = base  # held, so that no other tensor gets its id
        return tensor

    num_images = 2  # the mean of two, for what is kept once for a batch counts less then
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(torch.zeros((num_images, *image_shape)))
    del output
    return sum(t.numel() * t.element_size() for t in kept.values() if id(t) not in weights) // num_images


def read_available_bytes() -> int | None:
    """Return the memory that this process can still take; None where the system does not say."""
    try:
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines() if ":" in line)
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    for limit_file, used_file in LIMITS:
        try:
            limit, used = int(Path(limit_file).read_text()), int(Path(used_file).read_text())
        except (OSError, ValueError):  # "max": none
            continue
        used -= read_reclaimable_bytes(Path(limit_file).with_name("memory.stat"))
        available = min(available, max(limit - used, 0))
    return available


def read_process_bytes() -> int | None:
    """Return the memory that this process takes now; None where the system does not say."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def read_reclaimable_bytes(statistics: Path) -> int:
    """Return what a container holds of files that were read and are not in use: the system drops it when memory is low.

    statistics: memory.stat of the cgroup; version 1 counts groups below it under another name.
    """
    try:
        counts = dict(line.split() for line in statistics.read_text().splitlines())
        return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0
