"""Collective operations over the processes of a run; with a single process they return their input.

A loss over the global batch gathers rows with `all_gather_with_gradient`, whose backward pass sums the gradients that
all processes have for a row. Every process computes the same loss, and DDP averages the gradients of the weights. The
result is the gradient that one process would compute on the whole batch.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        dist.barrier()


def all_row_counts(rows: Tensor) -> list[int]:
    """Return how many rows each process has, in rank order; `rows` are those of this process."""
    if world_size() == 1:
        return [len(rows)]
    own_count = torch.tensor([len(rows)], device=rows.device)
    all_counts = [torch.zeros_like(own_count) for _ in range(world_size())]
    dist.all_gather(all_counts, own_count)
    return torch.cat(all_counts).tolist()


def global_mean_factor(rows: Tensor) -> float:
    """Return the factor that turns means over the rows of each process into the mean over the rows of all.

    The mean over this process's `rows` times this factor, averaged over the processes as DDP does, is the mean over the
    global batch. The factor is 1 where all processes have equally many rows.
    """
    return len(rows) * world_size() / sum(all_row_counts(rows))


def all_gather(rows: Tensor) -> Tensor:
    """Return the rows (n_r, ...) of all processes in rank order, without gradient.

    The number of rows n_r may differ between processes and may be 0.
    """
    return rows.detach() if world_size() == 1 else _all_gather_uneven(rows.detach(), all_row_counts(rows))


def all_gather_views(rows: Tensor, num_views: int) -> Tensor:
    """Return the rows (V * n_r, ...) of all processes as (V * N, ...), without gradient.

    Rows are those of V views of a batch, one view after the other, in both; the images of a view are in rank order.
    """
    if world_size() == 1:
        return rows.detach()
    images_first = rows.unflatten(0, (num_views, -1)).transpose(0, 1)
    return all_gather(images_first).transpose(0, 1).flatten(0, 1)


def all_gather_with_gradient(rows: Tensor) -> Tensor:
    """Return the rows (n_r, ...) of all processes in rank order; their gradients are summed over the processes.

    The number of rows n_r may differ between processes and may be 0.
    """
    return rows if world_size() == 1 else cast(Tensor, _AllGatherWithGradient.apply(rows, all_row_counts(rows)))


def _all_gather_uneven(rows: Tensor, row_counts: list[int]) -> Tensor:
    """Return the rows of all processes; torch's all_gather needs equal shapes, so they are padded for the way."""
    padded = rows.new_zeros((max(row_counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in row_counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, row_counts, strict=True)])


class _AllGatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, row_counts: list[int]) -> Tensor:
        first = sum(row_counts[: rank()])
        ctx.own_rows = slice(first, first + len(rows))
        return _all_gather_uneven(rows, row_counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.own_rows], None


def sum_with_gradient(values: Tensor) -> Tensor:
    """Return the sum of `values` over all processes; their gradients are summed over the processes, too."""
    if world_size() == 1:
        return values
    return cast(Tensor, _AllGatherWithGradient.apply(values.unsqueeze(0), [1] * world_size())).sum(0)


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of `values` over all processes, without gradient; a single process gets them as they are."""
    if world_size() == 1:
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def broadcast_buffers(module: nn.Module) -> None:
    """Replace the buffers of `module` on every process by those of rank 0.

    Running statistics differ between processes; this makes them those of one network.
    """
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def broadcast(values: Tensor, source: int) -> Tensor:
    """Return the `values` of process `source`, written into `values`; shapes and dtypes must agree."""
    if world_size() > 1:
        dist.broadcast(values, source)
    return values
