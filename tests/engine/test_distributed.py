"""Several processes compute what one computes on the joined batch; real gloo processes on the CPU."""

import pytest
import torch
from torch import distributed as dist
from torch import nn

from deepclust.engine import distributed
from deepclust.engine.batch_norm import synchronise_batch_norm
from tests.processes import run_on_processes


def _call_every_operation(rank):
    """Return what each operation gives on process `rank` of two, the first of which has no rows."""
    rows, values = torch.full((2 * rank, 2), float(rank)), torch.tensor([rank + 1.0, 10.0], requires_grad=True)
    total = distributed.sum_with_gradient(values)
    ((rank + 1) * total).sum().backward()
    network = nn.BatchNorm1d(1)
    network.running_mean.fill_(rank)
    distributed.broadcast_buffers(network)
    distributed.barrier()
    return {
        "rank and number": [distributed.rank(), distributed.world_size()],
        "counts": distributed.all_row_counts(rows),
        "rows": distributed.all_gather(rows).tolist(),
        "others": distributed.all_gather(torch.full((2 - rank,), rank)).tolist(),
        "sum": total.tolist(),
        "gradient": values.grad.tolist(),
        "mean": distributed.mean_over_processes(torch.tensor([rank, 6.0])).tolist(),
        "buffer": network.running_mean.item(),
        "of the last": distributed.broadcast(torch.tensor([rank]), 1).item(),
        "of the first": distributed.broadcast(torch.tensor([rank]), 0).item(),
    }


def test_every_operation_with_different_numbers_of_rows_and_none(tmp_path):
    expected = {
        "counts": [0, 2],
        "rows": [[1.0, 1.0], [1.0, 1.0]],
        "others": [0, 0, 1],
        "sum": [3.0, 20.0],
        "gradient": [3.0, 3.0],  # that of both processes: 1 + 2
        "mean": [0.5, 6.0],
        "buffer": 0.0,
        "of the last": 1,
        "of the first": 0,
    }
    for rank, results in enumerate(run_on_processes(_call_every_operation, 2, tmp_path)):
        assert results == {"rank and number": [rank, 2], **expected}


def test_two_processes_wait_for_each_other(monkeypatch):
    waits = []
    monkeypatch.setattr(dist, "barrier", lambda: waits.append(1))
    for number in (1, 2):
        monkeypatch.setattr(distributed, "world_size", lambda number=number: number)
        distributed.barrier()
    assert waits == [1]


def make_network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).double()


def pairwise_loss(rows):
    """A loss that needs all rows of the global batch."""
    return torch.cdist(rows, rows.roll(1, 0)).square().logsumexp(1).mean()


def _compute_step(rank, images, edges):
    network = synchronise_batch_norm(make_network())
    rows = network(images[edges[rank] : edges[rank + 1]])
    mean_loss = distributed.global_mean_factor(rows) * rows.square().mean()
    loss = pairwise_loss(distributed.all_gather_with_gradient(rows)) + mean_loss
    loss.backward()
    for p in network.parameters():  # what DDP does
        dist.all_reduce(p.grad)
        p.grad /= 2
    return loss.detach(), [p.grad for p in network.parameters()], dict(network.named_buffers())


@pytest.mark.parametrize("edges", [(0, 4, 8), (0, 3, 8)])
def test_loss_gradients_and_running_statistics_equal_one_process(tmp_path, edges):
    images = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    network = make_network()
    rows = network(images)
    loss = pairwise_loss(rows) + rows.square().mean()
    loss.backward()
    results = run_on_processes(_compute_step, 2, tmp_path, images, edges)
    torch.testing.assert_close(sum(r[0] for r in results) / 2, loss.detach(), rtol=1e-12, atol=0)
    for _, gradients, buffers in results:
        for gradient, parameter in zip(gradients, network.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)
        for name, value in network.named_buffers():
            torch.testing.assert_close(buffers[name], value, rtol=1e-10, atol=1e-12)


def test_on_one_process_rows_are_returned_as_they_are():
    rows = torch.randn(4, 2, requires_grad=True)
    assert distributed.all_gather_with_gradient(rows) is rows
    assert distributed.sum_with_gradient(rows) is rows and distributed.broadcast(rows, 0) is rows
    for gathered in (distributed.all_gather(rows), distributed.mean_over_processes(rows)):
        assert torch.equal(gathered, rows) and not gathered.requires_grad
    assert (distributed.rank(), distributed.world_size(), distributed.all_row_counts(rows)) == (0, 1, [4])
    assert distributed.global_mean_factor(rows) == 1
    distributed.barrier()
