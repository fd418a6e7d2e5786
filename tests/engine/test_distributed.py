"""Several processes compute what one computes on the joined batch; real gloo processes on the CPU."""

import os
import socket

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing import spawn

from deepclust.engine import distributed


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def _enter(rank, work, processes, port, folder, arguments):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    try:
        torch.save(work(rank, *arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_processes(work, processes, folder, *arguments):
    """What `work(rank, *arguments)` returns on each of several processes."""
    spawn(_enter, (work, processes, free_port(), folder, arguments), nprocs=processes)
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def _collect(rank):
    return distributed.gather(torch.full((rank, 2), float(rank)))


def test_gather_takes_uneven_and_empty_shares(tmp_path):
    expected = torch.tensor([[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]])
    for got in on_processes(_collect, 3, tmp_path):
        assert torch.equal(got, expected)


def make_network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).double()


def pairwise(rows):
    """A loss that no share of the batch can compute alone."""
    return torch.cdist(rows, rows.roll(1, 0)).square().logsumexp(1).mean()


def _step(rank, images, cuts):
    network = distributed.synchronise_batch_norm(make_network())
    mine = images[cuts[rank] : cuts[rank + 1]]
    rows = network(mine)
    loss = pairwise(distributed.gather_with_gradient(rows)) + distributed.mean_weight(rows) * rows.square().mean()
    loss.backward()
    for p in network.parameters():  # what DDP does
        dist.all_reduce(p.grad)
        p.grad /= 2
    return loss.detach(), [p.grad for p in network.parameters()], dict(network.named_buffers())


@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 3, 8)])
def test_loss_gradients_and_running_statistics_equal_one_process(tmp_path, cuts):
    images = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    network = make_network()
    rows = network(images)
    loss = pairwise(rows) + rows.square().mean()
    loss.backward()
    results = on_processes(_step, 2, tmp_path, images, cuts)
    torch.testing.assert_close(sum(r[0] for r in results) / 2, loss.detach(), rtol=1e-12, atol=0)
    for _, gradients, buffers in results:
        for got, parameter in zip(gradients, network.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-9, atol=1e-12)
        for name, value in network.named_buffers():
            torch.testing.assert_close(buffers[name], value, rtol=1e-10, atol=1e-12)


def test_one_process_passes_through():
    rows = torch.randn(4, 2, requires_grad=True)
    assert distributed.gather_with_gradient(rows) is rows
    assert torch.equal(distributed.gather(rows), rows) and not distributed.gather(rows).requires_grad


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5)])
def test_synchronised_norm_on_one_process_is_the_plain_one(shape):
    plain = nn.Sequential(nn.BatchNorm1d(4))
    ours = distributed.synchronise_batch_norm(nn.Sequential(nn.BatchNorm1d(4)))
    values = torch.randn(shape)
    assert torch.equal(ours(values), plain(values))
    assert torch.equal(ours[0].running_var, plain[0].running_var)
