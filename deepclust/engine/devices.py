"""Devices: which one a command uses, how many a run uses, and the options of conf/hardware applied to a method."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch.optim import Optimizer

from deepclust.engine import distributed
from deepclust.engine.batch_norm_groups import group_batch_norm
from deepclust.engine.cuda_graphs import AcceleratedFunctions
from deepclust.errors import InputError


def check_accelerator(accelerator: str, *, key: str) -> None:
    """Check that this machine has what `accelerator` names, the value of the key `key` of a configuration.

    Raises:
        InputError: if it has not; it names the key.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    available = {"auto": True, "cpu": True, "gpu": has_cuda or has_mps, "cuda": has_cuda, "mps": has_mps}
    if not available.get(accelerator, False):
        is_known = accelerator in available
        raise InputError(
            f"{key} is {accelerator}" + (", and torch finds no such device on this machine" if is_known else ""),
            expected=" or ".join(name for name, is_there in available.items() if is_there),
            do=f"set {key}=auto" + (", or hardware=auto" if key.startswith("hardware.") else ""),
        )


def select_device(accelerator: str) -> torch.device:
    """Return the device that `accelerator` (auto, cpu, gpu) means on this machine.

    Raises:
        InputError: if there is no such device.
    """
    check_accelerator(accelerator, key="accelerator")
    use_gpu = torch.cuda.is_available() if accelerator == "auto" else accelerator in ("gpu", "cuda")
    return torch.device("cuda" if use_gpu else "cpu")


def count_devices(accelerator: str, devices: int | str) -> int:
    """Return how many devices `hardware.devices` means on this machine."""
    if devices != "auto":
        return int(devices)
    return max(torch.cuda.device_count(), 1) if accelerator in ("auto", "gpu", "cuda") else 1


def apply_hardware_options(
    method: Any,
    views: Any,
    *,
    channels_last: bool,
    sync_batchnorm: bool,
    batch_norm_groups: int,
    compile: str | None,
    graphs: bool,
    fused_optimizer: bool,
) -> None:
    """Prepare a new method and its views for the devices and processes that it is trained on.

    The options are those of conf/hardware, `sync_batchnorm` and `batch_norm_groups`.

    Raises:
        InputError: if `compile` is a mode of torch.compile that makes its own CUDA graphs.
    """
    if channels_last:
        method.to(memory_format=torch.channels_last)
    if sync_batchnorm:
        distributed.synchronise_batch_norm(method)
    if batch_norm_groups > 1:
        method.batch_norm_groups = group_batch_norm(method, batch_norm_groups)
    if compile in ("reduce-overhead", "max-autotune"):
        raise InputError(
            f"hardware.compile={compile} makes its own CUDA graphs",
            expected="default or max-autotune-no-cudagraphs",
            do="set hardware.graphs=true for CUDA graphs",
        )
    if compile is not None:
        method.compile_networks(compile)
    if graphs:
        method.use_cuda_graphs()
    views.run_on_device = AcceleratedFunctions(compile_mode=compile, replayed=graphs)
    if fused_optimizer:
        method.make_optimizer = use_fused_kernel(method.make_optimizer)


def use_fused_kernel(make_optimizer: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """Return `make_optimizer` with `fused=True`, one kernel for a whole step, if that optimiser has this option.

    The results are equal but for rounding.
    """
    if "fused" not in signature(make_optimizer).parameters:
        return make_optimizer
    return partial(make_optimizer, fused=True)
