"""Schedules at their turning points, and LARS against its equations."""

import math

import pytest
import torch
from torch import nn

from deepclust.nn.optimizers import Lars
from deepclust.nn.schedules import DeadEpochCosine, EpochCosine, RisingCosine


def test_dead_epoch_then_warm_up_then_cosine():
    rates = DeadEpochCosine(warmup_epochs=11, epochs=401)
    at = [rates(step, 391) for step in range(1, 401 * 391 + 1)]
    assert not any(at[:391])
    assert at[391] == at[392] == pytest.approx(1 / 3910)
    assert at[11 * 391 - 1] == pytest.approx(3909 / 3910) and at[11 * 391] == 1.0
    assert at[11 * 391 + 390 * 391 // 2] == pytest.approx(0.5, abs=1e-4)
    assert all(a >= b for a, b in zip(at[11 * 391 :], at[11 * 391 + 1 :], strict=False)) and 0 < at[-1] < 1e-8


@pytest.mark.parametrize(("warmup", "epochs"), [(1, 1), (11, 2), (2, 2), (3, 4)])
def test_short_runs_have_rates(warmup, epochs):
    rates = DeadEpochCosine(warmup_epochs=warmup, epochs=epochs)
    assert all(0 <= rates(step, 3) <= 1 for step in range(1, 3 * epochs + 2))  # the scheduler asks one step ahead


def test_epoch_cosine_is_held_for_an_epoch():
    rates = EpochCosine(epochs=10, floor=0.001)
    at = [rates(step, 7) for step in range(1, 71)]
    assert at[:7] == [1.0] * 7 and all(len(set(at[7 * e : 7 * e + 7])) == 1 for e in range(10))
    assert at[35] == pytest.approx(0.5005) and rates(71, 7) == pytest.approx(0.001)
    assert all(a > b for a, b in zip(at[::7], at[7::7], strict=False))


def test_rising_cosine():
    rates = RisingCosine(epochs=10)
    assert rates(1, 7) == 0.0 and rates(36, 7) == pytest.approx(0.5) and rates(70, 7) < 1.0


def test_lars_step_by_step():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((4, 3), (5,), (2, 3, 2, 2))]
    values = [p.detach().clone() for p in parameters]
    buffers = [torch.zeros_like(v) for v in values]
    optimizer = Lars(parameters, lr=0.3, momentum=0.9, weight_decay=0.01, trust=0.02)
    for _ in range(4):
        for number, p in enumerate(parameters):
            p.grad = torch.randn_like(p)
            gradient = p.grad.clone()
            if p.dim() > 1:
                gradient += 0.01 * values[number]
                gradient *= 0.02 * math.sqrt(values[number].square().sum()) / math.sqrt(gradient.square().sum())
            buffers[number] = 0.9 * buffers[number] + gradient
            values[number] = values[number] - 0.3 * buffers[number]
        optimizer.step()
    for p, value in zip(parameters, values, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=0)


def test_lars_where_a_length_is_zero():
    still, new = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(2, 2))
    still.grad, new.grad = torch.zeros(2, 2), torch.ones(2, 2)
    Lars([still, new], lr=0.5, momentum=0.9, weight_decay=0.0, trust=0.001).step()
    assert torch.equal(still.detach(), torch.ones(2, 2)) and torch.equal(new.detach(), torch.full((2, 2), -0.5))


def test_lars_does_not_know_the_scale_of_a_gradient():
    twins = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    gradient = torch.randn(3, 2)
    twins[0].grad, twins[1].grad = gradient, 1000 * gradient
    Lars(twins, lr=0.5, momentum=0.9, weight_decay=0.0, trust=0.001).step()
    torch.testing.assert_close(twins[0], twins[1])
