"""Replayed calls compute what the functions compute; the tests that need a GPU are left out where there is none."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclust.ema import Target
from deepclust.graphs import Replayed, as_written

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def network(device="cuda"):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 8)).to(device, memory_format=torch.channels_last)


def replay(net):
    net._compiled_call_impl = Replayed(net._call_impl, net)
    return net


def views(seed, n=32):
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 12, 12, generator=drawn).cuda().contiguous(memory_format=torch.channels_last)] * 2


def test_on_a_cpu_a_call_is_a_call():
    plain, replayed = network("cpu"), replay(network("cpu"))
    images = torch.randn(4, 3, 12, 12)
    assert torch.equal(plain(images), replayed(images))
    assert not replayed._compiled_call_impl.recordings


def train(net, steps, *, precision=torch.float32, add_up=1, n=32):
    """Losses of steps as ProPos takes them: a pass of each view, one backward pass, a target that follows."""
    torch.manual_seed(1)
    head = nn.Linear(8, 8).cuda()
    target = Target(net, head)
    if isinstance(net._compiled_call_impl, Replayed):
        replay(target)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses, kept = [], []
    for step in range(steps):
        a, b = views(step, n)
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            q_a, k_b = net(a), target(b)
            q_b, k_a = net(b + 1), target(a + 1)
            loss = -(F.normalize(q_a.float()) * k_b).sum(1).mean() - (F.normalize(q_b.float()) * k_a).sum(1).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        kept.append(q_a.detach())
        target.follow(net, head, decay=0.9)
        if (step + 1) % add_up == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses, kept


@on_gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add_up", [1, 2])
def test_training_is_the_same(precision, add_up):
    plain, replayed = network(), replay(network())
    expected, rows = train(plain, 6, precision=precision, add_up=add_up)
    found, kept = train(replayed, 6, precision=precision, add_up=add_up)
    close = {"rtol": 1e-4, "atol": 1e-5} if precision == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    assert found == pytest.approx(expected, rel=close["rtol"], abs=close["atol"])
    for one, other in zip(kept, rows, strict=True):  # results stay as they were, though memory is used again
        torch.testing.assert_close(one, other, **close)
    for (name, one), other in zip(replayed.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, **close, msg=lambda m, name=name: f"{name}: {m}")
    recordings = [len(alike) for alike in replayed._compiled_call_impl.recordings.values()]
    assert recordings == [2]  # one for each pass that waits for its backward pass


@on_gpu
def test_a_pass_that_is_never_called_back_is_free_again():
    net = replay(network())
    for step in range(6):
        net(views(step)[0])
    assert [len(alike) for alike in net._compiled_call_impl.recordings.values()] == [1]


@on_gpu
def test_evaluation_other_batches_and_frozen_weights_are_kinds_of_their_own():
    plain, replayed = network(), replay(network())
    for step in range(4):
        for n in (32, 8):
            images = views(step, n)[0]
            for net in (plain, replayed):
                net.train()
                net(images).sum().backward()
            with torch.no_grad():
                plain.eval(), replayed.eval()
                torch.testing.assert_close(replayed(images), plain(images))
    plain[0].requires_grad_(False), replayed[0].requires_grad_(False)
    for net in (plain, replayed):
        net.train().zero_grad()
    for step in range(3):
        images = views(step)[0].requires_grad_()
        again = images.detach().clone().requires_grad_()
        plain(images).square().sum().backward()
        replayed(again).square().sum().backward()
        torch.testing.assert_close(again.grad, images.grad)
    assert replayed[0].weight.grad is None
    torch.testing.assert_close(replayed[5].weight.grad, plain[5].weight.grad)


@on_gpu
def test_weights_that_have_moved_are_followed():
    net = replay(network()).eval()
    images = views(0)[0]
    with torch.no_grad():
        for _ in range(3):
            before = net(images)
        net.cpu()
        occupied = [p.detach().clone() + 1 for p in network().parameters()]  # where the weights were
        net.cuda()
        for _ in range(3):
            torch.testing.assert_close(net(images), before)
        net[5].bias.add_(1)  # in place, as an optimiser does it
        torch.testing.assert_close(net(images), before + 1)
    assert occupied


@on_gpu
def test_as_written_is_not_replayed():
    net = replay(network())
    with as_written():
        for step in range(3):
            net(views(step)[0])
    assert not net._compiled_call_impl.seen


@on_gpu
def test_a_copy_is_not_replayed():
    assert copy.deepcopy(replay(network()))._compiled_call_impl is None
