"""Collectives that are the identity on one process.

Losses over the global batch gather rows with `gather_with_gradient`, whose backward pass sums what every process sends
back. Each process computes the same loss, and DDP averages the gradients: the result is the gradient of one process on
the joined batch.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Come back once every process is here."""
    if world_size() > 1:
        dist.barrier()


def gather(rows: Tensor) -> Tensor:
    """Rows (n_r, ...) of all processes in rank order, without gradient; the counts may differ, also be 0."""
    if world_size() == 1:
        return rows.detach()
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(c) for c in counts]
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    pieces = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(pieces, padded)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        pieces = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(pieces, rows.contiguous())
        ctx.size = len(rows)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.size : (rank() + 1) * ctx.size]


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Rows (n, ...) of all processes, (world_size * n, ...) in rank order; n must be equal everywhere."""
    return rows if world_size() == 1 else cast(Tensor, _GatherWithGradient.apply(rows))


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process rank 0's buffers: running statistics differ from rank to rank, and one network is meant."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def broadcast(values: Tensor, source: int) -> Tensor:
    """The `values` of process `source`; shapes and dtypes must agree."""
    if world_size() > 1:
        dist.broadcast(values, source)
    return values


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the rows of all processes, on any device (torch's own refuses the CPU)."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm got a tensor of {input.dim()} dimensions; it needs (N, C, ...)")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        axes = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        count = gather(input.new_tensor([input.numel() / input.shape[1]])).sum()
        mean = _sum_over_ranks(input.sum(axes)) / count
        centred = input - mean.view(shape)
        variance = _sum_over_ranks(centred.square().sum(axes)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), momentum)
            unbiased = variance.detach() * count / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        return normalised if self.weight is None else normalised * self.weight.view(shape) + self.bias.view(shape)


def _sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of `values` over the processes; gradients of all processes come back."""
    return gather_with_gradient(values.unsqueeze(0)).sum(0)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every batch normalisation layer working over all processes; the parameters stay as they are."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SyncBatchNorm):
            new = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            new._parameters, new._buffers = child._parameters, child._buffers
            new.training = child.training
            setattr(module, name, new)
        else:
            synchronise_batch_norm(child)
    return module
