"""Checks of the batches of an epoch against what the network needs, before training begins."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from deepclust.batch import PaddedImages
from deepclust.datasets.image_sources import ImageSource, WholeImageSource
from deepclust.engine.batch_norm import GroupedBatchNorm, SyncBatchNorm
from deepclust.errors import InputError
from deepclust.views.multiview import MultiView


def check_views_of_whole_images(views: MultiView, source: ImageSource) -> None:
    """Make all views of one image once, if the images have shapes of their own: the smallest one, where it is known.

    Raises:
        InputError: if a pipeline does not bring such images to one size.
    """
    if source.shape[0] is None:
        images = source.read(np.array([source.smallest() if isinstance(source, WholeImageSource) else 0]))
        assert isinstance(images, PaddedImages)
        views.clean(images)
        views(images, torch.Generator(), rows=slice(0, 1), global_batch_size=1)


def check_batch_statistics(
    method: nn.Module, batch_sizes: Iterable[int], *, batch_size: int, num_processes: int
) -> None:
    """Refuse batches too small for batch normalisation: it needs two images in the share of each process.

    Where the processes compute the statistics together, it needs two in the whole batch, and where these are those of
    groups, two in each group.

    Args:
        method: what is trained.
        batch_sizes: the sizes of the global batches of an epoch.
        batch_size: the size that is configured; only the last batch of an epoch may have another.
        num_processes: how many processes share a batch.

    Raises:
        InputError: if a batch is too small.
    """
    layers = [layer for layer in method.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    are_synchronised = all(isinstance(layer, SyncBatchNorm) for layer in layers)
    num_groups = next((layer.groups.num_groups for layer in layers if isinstance(layer, GroupedBatchNorm)), None)
    least = 2 * (num_groups or (1 if are_synchronised else num_processes))
    smallest = min(batch_sizes, default=least)
    if not layers or smallest >= least:
        return
    on_processes = f" on {num_processes} processes" if num_processes > 1 else ""
    is_last = smallest < batch_size
    what = f"{'the last batch of an epoch holds' if is_last else 'batch_size is'} {smallest}{on_processes}"
    larger = "drop_last=true or another batch_size, or add images" if is_last else f"batch_size={least} or more"
    fitting_groups = smallest // (2 * num_processes) * num_processes  # they divide among the processes
    if num_groups and fitting_groups:
        larger = f"batch_norm_groups={fitting_groups}, or {larger}"
    raise InputError(
        f"{what}, and the network normalises over batches" + (f" in {num_groups} groups" if num_groups else ""),
        expected=f"{least} images in a batch at least",
        do=f"set {larger}",
    )
