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


def counts(rows: Tensor) -> list[int]:
    """How many rows each process has, of which `rows` are this one's."""
    if world_size() == 1:
        return [len(rows)]
    mine = torch.tensor([len(rows)], device=rows.device)
    every = [torch.zeros_like(mine) for _ in range(world_size())]
    dist.all_gather(every, mine)
    return torch.cat(every).tolist()


def mean_weight(rows: Tensor) -> float:
    """What a mean over this process's `rows` is multiplied by, so that DDP's average over the processes is the mean
    over the rows of all."""
    return len(rows) * world_size() / sum(counts(rows))


def gather(rows: Tensor) -> Tensor:
    """Rows (n_r, ...) of all processes in rank order, without gradient; the counts may differ, also be 0."""
    return rows.detach() if world_size() == 1 else _joined(rows.detach(), counts(rows))


def _joined(rows: Tensor, sizes: list[int]) -> Tensor:
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    pieces = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(pieces, padded)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        first = sum(sizes[: rank()])
        ctx.mine = slice(first, first + len(rows))
        return _joined(rows, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.mine], None


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Rows (n_r, ...) of all processes in rank order; the counts may differ, also be 0."""
    return rows if world_size() == 1 else cast(Tensor, _GatherWithGradient.apply(rows, counts(rows)))


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
    if world_size() == 1:
        return values
    return cast(Tensor, _GatherWithGradient.apply(values.unsqueeze(0), [1] * world_size())).sum(0)


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
