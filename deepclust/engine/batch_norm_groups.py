"""Batch normalisation in groups: one process computes what several processes compute without synchronisation.

Many published runs had batch statistics of each device by itself, which a single device with the whole batch does not
have. In a batch of N images, group g of G holds the images from N g / G to N (g + 1) / G, which are the share of
process g of G. A layer that is given several views of the batch in one tensor, one after the other, as (V * N, ...),
computes the statistics of a group from all views of its images. The running statistics are those of the first group,
as several processes use those of process 0 when they evaluate.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.engine import distributed
from deepclust.errors import InputError


@dataclass
class RowGroups:
    """Which images of the current batch share batch statistics; all layers of a method have the same one.

    `num_groups` is the number of groups G of the global batch; `num_images` is the number of images of the current
    batch that this process holds, and `first_image` and `global_batch_size` place them in the global batch.
    """

    num_groups: int
    num_images: int = 0
    first_image: int = 0
    global_batch_size: int = 0

    def set_batch(self, num_images: int, first_image: int, global_batch_size: int) -> None:
        """Note the batch that the layers are given next."""
        self.num_images, self.first_image, self.global_batch_size = num_images, first_image, global_batch_size

    @property
    def signature(self) -> tuple[int, int, int, int]:
        """What decides how rows are grouped."""
        return self.num_groups, self.num_images, self.first_image, self.global_batch_size

    def edges(self) -> list[int]:
        """Return where the groups of this process begin and end among its images; the first is 0."""
        num_own = self.num_groups // distributed.world_size()
        first = distributed.rank() * num_own
        groups = range(first, first + num_own + 1)
        return [self.global_batch_size * group // self.num_groups - self.first_image for group in groups]


class GroupedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation whose statistics, in training, are those of each group of `groups` by itself."""

    groups: RowGroups

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"GroupedBatchNorm got a tensor of {input.dim()} dimensions; it needs (N, C, ...)")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        num_images = self.groups.num_images
        assert num_images and len(input) % num_images == 0, f"{len(input)} rows of a batch of {num_images} images"
        views = input.unflatten(0, (-1, num_images))
        edges, parts = self.groups.edges(), []
        for number, (start, end) in enumerate(pairwise(edges)):
            rows = views[:, start:end].flatten(0, 1)
            if number == 0:
                normalised = super().forward(rows)  # also moves the running statistics
            else:
                normalised = F.batch_norm(rows, None, None, self.weight, self.bias, training=True, eps=self.eps)
            parts.append(normalised.unflatten(0, (len(views), -1)))
        return torch.cat(parts, 1).flatten(0, 1)


def check_groups(num_groups: int, *, batch_size: int, drop_last: bool, sync_batchnorm: bool) -> None:
    """Check that batches can be normalised in `num_groups` groups on the processes of this run.

    Raises:
        InputError: if not.
    """
    num_processes = distributed.world_size()
    if num_groups == 1:
        return
    if sync_batchnorm:
        raise InputError(
            f"batch_norm_groups is {num_groups}, and sync_batchnorm=true has one group",
            expected="one of the two",
            do="set sync_batchnorm=false, or batch_norm_groups=1",
        )
    if num_groups % num_processes:
        raise InputError(
            f"batch_norm_groups is {num_groups} on {num_processes} processes",
            expected="a number of groups that divides among the processes",
            do=f"set hardware.devices to a divisor of {num_groups}, or batch_norm_groups={num_processes}",
        )
    smallest_batch = batch_size if drop_last else -(-batch_size // 8)  # see `ImageDataModule.count_batches`
    if smallest_batch < 2 * num_groups:
        last = "" if drop_last else ", whose last batch can be an eighth of it,"
        raise InputError(
            f"batch_norm_groups is {num_groups} with batch_size={batch_size}{last}",
            expected="two images or more in each group",
            do=f"set batch_norm_groups={max(1, smallest_batch // 2)} or less",
        )


def group_batch_norm(module: nn.Module, num_groups: int) -> RowGroups:
    """Replace every batch normalisation layer in `module` by a `GroupedBatchNorm`; return what they have in common.

    The new layers hold the same parameters and buffers.
    """
    groups = RowGroups(num_groups)
    _replace_layers(module, groups)
    return groups


def _replace_layers(module: nn.Module, groups: RowGroups) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            layer = GroupedBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            layer._parameters, layer._buffers = child._parameters, child._buffers
            layer.training = child.training
            layer.groups = groups
            setattr(module, name, layer)
        else:
            _replace_layers(child, groups)
