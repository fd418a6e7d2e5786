"""Replayed calls compute what the functions compute: on a GPU where there is one, and everywhere with a stand-in."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclust.engine import cuda_graphs
from deepclust.engine.cuda_graphs import Prepared, Replayed, ReplayedParts, as_written, replayable
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.nn.ema import Target
from tests.cuda_graph_stand_in import stand_in


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    if request.param == "cpu":
        stand_in(monkeypatch)
    elif not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


def network(device, *more):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 8), *more).to(device, memory_format=torch.channels_last)


def recordings(net):
    return [len(alike) for alike in net._compiled_call_impl.recordings.values()]


def replay(net):
    net._compiled_call_impl = Replayed(net._call_impl, net)
    return net


def images(device, seed, n=32):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 12, 12, generator=drawn).to(device, memory_format=torch.channels_last)


def test_on_a_cpu_a_call_is_a_call():
    plain, replayed = network("cpu"), replay(network("cpu"))
    for seed in range(3):
        assert torch.equal(plain(images("cpu", seed)), replayed(images("cpu", seed)))
    assert not recordings(replayed)


def train(net, steps, *, device, precision=torch.float32, add_up=1):
    """Losses of steps as ProPos takes them: a pass of each view, one backward pass, a target that follows."""
    torch.manual_seed(1)
    head = nn.Linear(8, 8).to(device)
    target = Target(net, head)
    if isinstance(net._compiled_call_impl, Replayed):
        replay(target)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses, kept = [], []
    for step in range(steps):
        torch.manual_seed(step)  # what dropout draws from
        a = images(device, step)
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            q_a, k_b = net(a), target(a)
            q_b, k_a = net(a + 1), target(a + 1)
            loss = -(F.normalize(q_a.float()) * k_b).sum(1).mean() - (F.normalize(q_b.float()) * k_a).sum(1).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        kept.append(q_a.detach())
        target.follow(net, head, decay=0.9)
        if (step + 1) % add_up == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses, kept


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add_up", [1, 2])
def test_training_is_the_same(precision, add_up, device):
    plain, replayed = network(device), replay(network(device))
    expected, rows = train(plain, 6, device=device, precision=precision, add_up=add_up)
    found, kept = train(replayed, 6, device=device, precision=precision, add_up=add_up)
    close = {"rtol": 1e-4, "atol": 1e-5} if precision == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    assert found == pytest.approx(expected, rel=close["rtol"], abs=close["atol"])
    for one, other in zip(kept, rows, strict=True):  # results stay as they were, though memory is used again
        torch.testing.assert_close(one, other, **close)
    for (name, one), other in zip(replayed.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, **close, msg=lambda m, name=name: f"{name}: {m}")
    assert recordings(replayed) == [2]  # one for each pass that waits for its backward pass


def test_recording_uses_up_no_random_numbers(device):
    plain, replayed = network(device, nn.Dropout(0.5)), replay(network(device, nn.Dropout(0.5)))
    expected, found = (train(net, 4, device=device)[0] for net in (plain, replayed))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_pass_that_is_never_called_back_is_free_again(device):
    net = replay(network(device))
    for step in range(6):
        net(images(device, step))
    assert recordings(net) == [1]


def test_a_second_backward_pass_is_refused(device):
    net = replay(network(device))
    for step in range(2):
        loss = net(images(device, step)).sum()
        loss.backward(retain_graph=True)
    with pytest.raises(InputError, match="a second time"):
        loss.backward()


def test_evaluation_other_batches_and_frozen_weights_are_kinds_of_their_own(device):
    plain, replayed = network(device), replay(network(device))
    for step in range(4):
        for n in (32, 8):
            batch = images(device, step, n)
            for net in (plain, replayed):
                net.train()
                net(batch).sum().backward()
            with torch.no_grad():
                plain.eval(), replayed.eval()
                torch.testing.assert_close(replayed(batch), plain(batch))
    for net in (plain, replayed):
        net[0].requires_grad_(False)
        net.train().zero_grad()
        net[1].eval()
    for step in range(3):
        batch = images(device, step).requires_grad_()
        again = batch.detach().clone().requires_grad_()
        plain(batch).square().sum().backward()
        replayed(again).square().sum().backward()
        torch.testing.assert_close(again.grad, batch.grad)
    assert replayed[0].weight.grad is None
    torch.testing.assert_close(replayed[5].weight.grad, plain[5].weight.grad)
    torch.testing.assert_close(replayed[1].running_mean, plain[1].running_mean)


@torch.no_grad()
def test_weights_that_have_moved_are_followed(device):
    net, batch = replay(network(device)).eval(), images(device, 0)
    for _ in range(3):
        before = net(batch)
    net.cpu()
    occupied = [p.detach().clone() + 1 for p in network(device).parameters()]  # where the weights were
    net.to(device)
    for _ in range(3):
        torch.testing.assert_close(net(batch), before)
    net[5].bias.add_(1)  # in place, as an optimiser does it
    torch.testing.assert_close(net(batch), before + 1)
    net[5].bias = nn.Parameter(net[5].bias + 1)
    for _ in range(3):
        torch.testing.assert_close(net(batch), before + 2)
    assert occupied


def test_results_of_several_parts_and_none_that_learns(device):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return {"rows": x * self.scale, "ids": x.argmax(1)}, x.detach() + 1

    plain, replayed = Parts().to(device), replay(Parts().to(device))
    for seed in range(4):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).to(device)
        for net in (plain, replayed):
            net.zero_grad()
            named, more = net(x)
            (named["rows"] * more).sum().backward()
            assert torch.equal(named["ids"], x.argmax(1)) and torch.equal(more, x + 1)
        assert torch.equal(plain.scale.grad, replayed.scale.grad) and replayed.unused.grad is None


def test_what_gives_no_tensors_is_refused_with_advice(device):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.weight, None

    net, x = replay(Odd().to(device)), torch.ones(2, 3, device=device)
    net(x)
    with pytest.raises(InputError, match="graphs=false"):
        net(x)


def test_recordings_are_released(device):
    net = replay(network(device))
    for step in range(3):
        net(images(device, step)).sum().backward()
    cuda_graphs.release()
    assert recordings(net) == []
    for step in range(2):
        net(images(device, step)).sum().backward()
    assert recordings(net) == [1]


def test_as_written_is_not_replayed(device):
    net = replay(network(device))
    with as_written():
        for step in range(3):
            net(images(device, step))
    assert not recordings(net)


def test_a_copy_is_not_replayed(device):
    assert copy.deepcopy(replay(network(device)))._compiled_call_impl is None


def test_functions_by_a_key(device):
    calls = []

    def doubled(x):
        calls.append(1)
        return (2 * x,)

    prepared = Prepared(mode=None, replayed=True)
    for value in range(5):
        for key in ("one", "other"):
            (found,) = prepared(key, doubled, torch.full((3,), float(value), device=device))
            assert found.tolist() == 3 * [2 * value]
    assert len(prepared.functions) == 2 and len(calls) == 2 * (1 + 3 + 1)  # once as it is, first times, recorded


class Method(nn.Module):
    """As much of a method as has to do with its parts."""

    def __init__(self):
        super().__init__()
        self.replayed_parts = ReplayedParts()
        self.weight, self.other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.register_buffer("sums", torch.zeros(3))
        self.factor = 1

    @replayable(by=lambda self: self.factor)
    def part(self, x, shift):
        self.sums += x.detach().sum(0)
        return {"y": self.factor * self.weight * (x if shift is None else x + shift)}

    def recordings(self):
        return sum(len(alike) for call in self.replayed_parts.calls.values() for alike in call.recordings.values())


def test_parts_of_a_method(device):
    plain, replayed = Method().to(device), Method().to(device)
    plain.replayed_parts = None
    for factor in (1, 2, 1):
        for seed in range(4):
            drawn = torch.Generator().manual_seed(seed)
            x = torch.randn(5, 3, generator=drawn).to(device).requires_grad_()
            for shift in (None, torch.ones(3, device=device)):
                results = []
                for method in (plain, replayed):
                    method.factor = factor
                    method.zero_grad()
                    x.grad = None
                    y = method.part(x, shift)["y"]
                    y.square().sum().backward()
                    results += [(y.detach(), x.grad, method.weight.grad, method.sums)]
                    assert method.other.grad is None
                for expected, found in zip(*results, strict=True):
                    torch.testing.assert_close(found, expected)
                del y
    assert replayed.recordings() == 4  # for both factors, with and without a shift
    assert copy.deepcopy(replayed).replayed_parts is None


def test_gradients_in_32_bits_are_no_less_when_replayed(device):
    """What autocast surrounds the recording is not to lower products of the backward pass."""

    class Product(Method):
        @replayable()
        @full_precision
        def part(self, x):
            return (x @ self.weight.diag()).square().sum()

    plain, replayed = Product().to(device), Product().to(device)
    plain.replayed_parts = None
    for seed in range(3):
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(seed)).to(device)
        for method in (plain, replayed):
            method.zero_grad()
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = method.part(x)
            loss.backward()
        torch.testing.assert_close(replayed.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-5)
    assert replayed.recordings() == 1


def test_no_rubbish_is_collected_while_a_graph_is_recorded(monkeypatch):
    """It may hold an old graph, and to destroy one would end the recording."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    assert cuda_graphs.Graph(gc.isenabled).result is False
    assert gc.isenabled()
