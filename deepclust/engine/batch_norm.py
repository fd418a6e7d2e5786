"""Batch normalisation over all processes, or in groups within one.

Synchronised layers compute the statistics of a batch over all processes. Layers in groups do the reverse: one process
computes what several processes compute without synchronisation.

Many published runs had batch statistics of each device by itself, which a single device with the whole batch does not
have. In a batch of N images, group g of G holds the images from N g / G to N (g + 1) / G, which are the share of
process g of G. A layer that is given several views of the batch in one tensor, one after the other, as (V * N, ...),
computes the statistics of a group from all views of its images. The running statistics are those of the first group,
as several processes use those of process 0 when they evaluate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from deepclust.engine import distributed
from deepclust.errors import InputError


class AnyDimBatchNorm(BatchNorm):
    """Batch normalisation of vectors (N, C) and of images (N, C, ...) alike."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"{type(self).__name__} got a tensor of {input.dim()} dimensions; it needs (N, C, ...)")


class SyncBatchNorm(AnyDimBatchNorm):
    """Batch normalisation over the rows of all processes, on any device; torch's own does not work on the CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        axes = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        count = distributed.all_gather(input.new_tensor([input.numel() / input.shape[1]])).sum()
        mean = distributed.sum_with_gradient(input.sum(axes)) / count
        centred = input - mean.view(shape)
        variance = distributed.sum_with_gradient(centred.square().sum(axes)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), momentum)
            unbiased = variance.detach() * count / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        return normalised if self.weight is None else normalised * self.weight.view(shape) + self.bias.view(shape)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every batch normalisation layer in `module` by a `SyncBatchNorm`, and return `module`.

    The new layers hold the same parameters and buffers.
    """
    replace_batch_norm(module, SyncBatchNorm)
    return module


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


class GroupedBatchNorm(AnyDimBatchNorm):
    """Batch normalisation whose statistics, in training, are those of each group of `groups` by itself."""

    groups: RowGroups

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


def check_groups(num_groups: int, *, sync_batchnorm: bool) -> None:
    """Check that batches of enough images can be normalised in `num_groups` groups on the processes of this run.

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


def group_batch_norm(module: nn.Module, num_groups: int) -> RowGroups:
    """Replace every batch normalisation layer in `module` by a `GroupedBatchNorm`; return the groups that they share.

    The new layers hold the same parameters and buffers.
    """
    groups = RowGroups(num_groups)

    def make_layer(*arguments: Any) -> GroupedBatchNorm:
        layer = GroupedBatchNorm(*arguments)
        layer.groups = groups
        return layer

    replace_batch_norm(module, make_layer)
    return groups


def replace_batch_norm(module: nn.Module, make_layer: Callable[..., BatchNorm]) -> None:
    """Replace every batch normalisation layer in `module` by what `make_layer` makes of its arguments.

    The new layers hold the same parameters and buffers, and are in the same mode.
    """
    for name, child in module.named_children():
        if isinstance(child, BatchNorm):
            layer = make_layer(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            layer._parameters, layer._buffers = child._parameters, child._buffers
            layer.training = child.training
            setattr(module, name, layer)
        else:
            replace_batch_norm(child, make_layer)
