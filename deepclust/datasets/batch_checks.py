"""Checks of the batches of an epoch against what the network needs, before training begins."""

from collections.abc import Iterable

from torch import nn

from deepclust.engine import distributed
from deepclust.errors import InputError


def check_batch_statistics(
    method: nn.Module, batch_sizes: Iterable[int], *, batch_size: int, num_processes: int
) -> None:
    """Refuse batches too small for batch normalisation: it needs two images in the share of each process.

    Where the processes compute the statistics together, it needs two in the whole batch.

    Args:
        method: what is trained.
        batch_sizes: the sizes of the global batches of an epoch.
        batch_size: the size that is configured; only the last batch of an epoch may have another.
        num_processes: how many processes share a batch.

    Raises:
        InputError: if a batch is too small.
    """
    layers = [layer for layer in method.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    are_synchronised = all(isinstance(layer, distributed.SyncBatchNorm) for layer in layers)
    least = 2 if are_synchronised else 2 * num_processes
    smallest = min(batch_sizes, default=least)
    if not layers or smallest >= least:
        return
    on_processes = f" on {num_processes} processes" if num_processes > 1 else ""
    is_last = smallest < batch_size
    what = f"{'the last batch of an epoch holds' if is_last else 'batch_size is'} {smallest}{on_processes}"
    raise InputError(
        f"{what}, and the network normalises over batches",
        expected=f"{least} images in a batch at least",
        do="set drop_last=true or another batch_size, or add images" if is_last else f"set batch_size={least} or more",
    )
