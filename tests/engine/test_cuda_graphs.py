"""Replayed calls compute what the functions compute: on a GPU where there is one, and everywhere with fake graphs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclust.engine import cuda_graphs
from deepclust.engine.cuda_graphs import (
    AcceleratedFunctions,
    ReplayedFunction,
    ReplayedParts,
    disable_replay,
    replayable,
)
from deepclust.engine.graph_recording import NUM_WARM_UP_CALLS
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.nn.ema import TargetNetwork
from tests.fake_cuda_graphs import use_fake_cuda_graphs


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    if request.param == "cpu":
        use_fake_cuda_graphs(monkeypatch)
    elif not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


def make_network(device, *more):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 8), *more).to(device, memory_format=torch.channels_last)


def count_recordings(net):
    """The number of recordings of each signature of a call."""
    return [len(recordings) for recordings in net._compiled_call_impl.recordings.values()]


def make_replayed(net):
    net._compiled_call_impl = ReplayedFunction(net._call_impl, net)
    return net


def make_images(device, seed, n=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 12, 12, generator=generator).to(device, memory_format=torch.channels_last)


def test_nothing_is_recorded_on_a_cpu():
    plain, replayed = make_network("cpu"), make_replayed(make_network("cpu"))
    for seed in range(3):
        assert torch.equal(plain(make_images("cpu", seed)), replayed(make_images("cpu", seed)))
    assert not count_recordings(replayed)


def train(net, steps, *, device, precision=torch.float32, accumulate=1):
    """Train as ProPos does: a pass of each view, one backward pass, a target network that follows.

    Returns the losses of the steps and their outputs.
    """
    torch.manual_seed(1)
    head = nn.Linear(8, 8).to(device)
    target = TargetNetwork(net, head)
    if isinstance(net._compiled_call_impl, ReplayedFunction):
        make_replayed(target)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses, outputs = [], []
    for step in range(steps):
        torch.manual_seed(step)  # what dropout draws from
        a = make_images(device, step)
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            q_a, k_b = net(a), target(a)
            q_b, k_a = net(a + 1), target(a + 1)
            loss = -(F.normalize(q_a.float()) * k_b).sum(1).mean() - (F.normalize(q_b.float()) * k_a).sum(1).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        outputs.append(q_a.detach())
        target.update(net, head, decay=0.9)
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses, outputs


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_the_same(precision, accumulate, device):
    plain, replayed = make_network(device), make_replayed(make_network(device))
    expected_losses, expected_outputs = train(plain, 6, device=device, precision=precision, accumulate=accumulate)
    losses, outputs = train(replayed, 6, device=device, precision=precision, accumulate=accumulate)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    assert losses == pytest.approx(expected_losses, rel=tolerance["rtol"], abs=tolerance["atol"])
    for output, expected in zip(outputs, expected_outputs, strict=True):  # later replays did not overwrite them
        torch.testing.assert_close(output, expected, **tolerance)
    for (name, value), expected in zip(replayed.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
    assert count_recordings(replayed) == [2]  # one for each pass whose backward pass is still to come


def test_recording_uses_up_no_random_numbers(device):
    plain, replayed = make_network(device, nn.Dropout(0.5)), make_replayed(make_network(device, nn.Dropout(0.5)))
    expected_losses, losses = (train(net, 4, device=device)[0] for net in (plain, replayed))
    assert losses == pytest.approx(expected_losses, rel=1e-4)


def test_a_recording_is_free_again_if_its_backward_pass_never_comes(device):
    net = make_replayed(make_network(device))
    for step in range(6):
        net(make_images(device, step))
    assert count_recordings(net) == [1]


def test_a_second_backward_pass_is_refused(device):
    net = make_replayed(make_network(device))
    for step in range(2):
        loss = net(make_images(device, step)).sum()
        loss.backward(retain_graph=True)
    with pytest.raises(InputError, match="second backward pass"):
        loss.backward()


def test_evaluation_other_batch_sizes_and_frozen_weights_have_their_own_recordings(device):
    plain, replayed = make_network(device), make_replayed(make_network(device))
    for step in range(4):
        for n in (32, 8):
            batch = make_images(device, step, n)
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
        batch = make_images(device, step).requires_grad_()
        same_batch = batch.detach().clone().requires_grad_()
        plain(batch).square().sum().backward()
        replayed(same_batch).square().sum().backward()
        torch.testing.assert_close(same_batch.grad, batch.grad)
    assert replayed[0].weight.grad is None
    torch.testing.assert_close(replayed[5].weight.grad, plain[5].weight.grad)
    torch.testing.assert_close(replayed[1].running_mean, plain[1].running_mean)


@torch.no_grad()
def test_weights_may_move_and_be_replaced(device):
    net, batch = make_replayed(make_network(device)).eval(), make_images(device, 0)
    for _ in range(3):
        before = net(batch)
    net.cpu()
    # Other values take the memory where the weights were.
    other_weights = [p.detach().clone() + 1 for p in make_network(device).parameters()]
    net.to(device)
    for _ in range(3):
        torch.testing.assert_close(net(batch), before)
    net[5].bias.add_(1)  # in place, as an optimiser does it
    torch.testing.assert_close(net(batch), before + 1)
    net[5].bias = nn.Parameter(net[5].bias + 1)
    for _ in range(3):
        torch.testing.assert_close(net(batch), before + 2)
    assert other_weights


def test_nested_results_some_of_them_without_gradient(device):
    class NestedResults(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return {"rows": x * self.scale, "indices": x.argmax(1)}, x.detach() + 1

    plain, replayed = NestedResults().to(device), make_replayed(NestedResults().to(device))
    for seed in range(4):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).to(device)
        for net in (plain, replayed):
            net.zero_grad()
            by_name, shifted = net(x)
            (by_name["rows"] * shifted).sum().backward()
            assert torch.equal(by_name["indices"], x.argmax(1)) and torch.equal(shifted, x + 1)
        assert torch.equal(plain.scale.grad, replayed.scale.grad) and replayed.unused.grad is None


def test_a_result_that_is_no_tensor_is_refused_with_advice(device):
    class ReturnsNone(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.weight, None

    net, x = make_replayed(ReturnsNone().to(device)), torch.ones(2, 3, device=device)
    net(x)
    with pytest.raises(InputError, match="graphs=false"):
        net(x)


def test_recordings_are_released(device):
    net = make_replayed(make_network(device))
    for step in range(3):
        net(make_images(device, step)).sum().backward()
    cuda_graphs.release_recordings()
    assert count_recordings(net) == []
    for step in range(2):
        net(make_images(device, step)).sum().backward()
    assert count_recordings(net) == [1]


def test_nothing_is_recorded_while_replay_is_disabled(device):
    net = make_replayed(make_network(device))
    with disable_replay():
        for step in range(3):
            net(make_images(device, step))
    assert not count_recordings(net)


def test_a_copy_is_not_replayed(device):
    assert copy.deepcopy(make_replayed(make_network(device)))._compiled_call_impl is None


def test_accelerated_functions_are_told_apart_by_their_keys(device):
    calls = []

    def double(x):
        calls.append(1)
        return (2 * x,)

    functions = AcceleratedFunctions(compile_mode=None, replayed=True)
    for value in range(5):
        for key in ("one", "other"):
            (result,) = functions(key, double, torch.full((3,), float(value), device=device))
            assert result.tolist() == 3 * [2 * value]
    assert len(functions.functions) == 2
    assert len(calls) == 2 * (1 + NUM_WARM_UP_CALLS + 1)  # the first call, the warm-up, the recording


class Method(nn.Module):
    """A method with one replayable part."""

    def __init__(self):
        super().__init__()
        self.replayed_parts = ReplayedParts()
        self.weight, self.other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.register_buffer("sums", torch.zeros(3))
        self.factor = 1

    @replayable(constants=lambda self: self.factor)
    def part(self, x, shift):
        self.sums += x.detach().sum(0)
        return {"y": self.factor * self.weight * (x if shift is None else x + shift)}

    def count_recordings(self):
        functions = self.replayed_parts.functions.values()
        return sum(len(recordings) for function in functions for recordings in function.recordings.values())


def test_parts_of_a_method(device):
    plain, replayed = Method().to(device), Method().to(device)
    plain.replayed_parts = None
    for factor in (1, 2, 1):
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(5, 3, generator=generator).to(device).requires_grad_()
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
                for expected, result in zip(*results, strict=True):
                    torch.testing.assert_close(result, expected)
                del y
    assert replayed.count_recordings() == 4  # for both factors, with and without a shift
    assert copy.deepcopy(replayed).replayed_parts is None


def test_replayed_gradients_of_full_precision_stay_in_32_bits(device):
    """Autocast is on during the recording and must not lower the products of the backward pass."""

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
    assert replayed.count_recordings() == 1
