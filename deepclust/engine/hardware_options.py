"""The options of conf/hardware, and those of batch normalisation, applied to a method and its views."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch.optim import Optimizer

from deepclust.engine.batch_norm import group_batch_norm, synchronise_batch_norm
from deepclust.engine.cuda_graphs import AcceleratedFunctions
from deepclust.errors import InputError


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
        synchronise_batch_norm(method)
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
