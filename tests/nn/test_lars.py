"""LARS in both forms against their equations."""

import math

import torch
from torch import nn

from deepclust.nn.lars import Lars, ScaledStepLars


def test_lars_step_by_step():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64) / 16) for shape in ((4, 3), (5,), (2, 3, 2, 2))]
    values = [p.detach().clone() for p in parameters]
    buffers = [torch.zeros_like(v) for v in values]
    optimizer = Lars(parameters, lr=0.3, momentum=0.9, weight_decay=0.01, trust=0.02)
    for _ in range(4):
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p) / 16
            gradient = p.grad.clone()
            if p.dim() > 1:
                gradient += 0.01 * values[i]
                gradient *= 0.02 * math.sqrt(values[i].square().sum()) / math.sqrt(gradient.square().sum())
            buffers[i] = 0.9 * buffers[i] + gradient
            values[i] = values[i] - 0.3 * buffers[i]
        optimizer.step()
    for p, value in zip(parameters, values, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=0)


def test_lars_where_a_norm_is_zero():
    zero_gradient, zero_weight = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(2, 2))
    zero_gradient.grad, zero_weight.grad = torch.zeros(2, 2), torch.ones(2, 2)
    Lars([zero_gradient, zero_weight], lr=0.5, momentum=0.9, weight_decay=0.0, trust=0.001).step()
    assert torch.equal(zero_gradient.detach(), torch.ones(2, 2))
    assert torch.equal(zero_weight.detach(), torch.full((2, 2), -0.5))


def test_lars_ignores_the_scale_of_a_gradient():
    twins = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    gradient = torch.randn(3, 2)
    twins[0].grad, twins[1].grad = gradient, 1000 * gradient
    Lars(twins, lr=0.5, momentum=0.9, weight_decay=0.0, trust=0.001).step()
    torch.testing.assert_close(twins[0], twins[1])


def test_scaled_step_lars_step_by_step():
    torch.manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(shape, dtype=torch.float64) / 16) for shape in ((4, 3), (5,), (6,), (2, 3, 2, 2))
    ]
    values = [p.detach().clone() for p in parameters]
    buffers = [torch.zeros_like(v) for v in values]
    groups = [{"params": [parameters[i] for i in (0, 1, 3)]}, {"params": [parameters[2]], "weight_decay": 0.0}]
    optimizer = ScaledStepLars(groups, lr=0.3, momentum=0.9, weight_decay=0.01, trust=0.02)
    for step in range(5):
        lr = 0.3 / (1 + step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p) / 16
            decay = 0.0 if i == 2 else 0.01
            rate = lr
            if decay:
                weight_norm, gradient_norm = (math.sqrt(t.square().sum()) for t in (values[i], p.grad))
                rate *= 0.02 * weight_norm / (gradient_norm + decay * weight_norm + 1e-8)
            buffers[i] = 0.9 * buffers[i] + rate * (p.grad + decay * values[i])
            values[i] = values[i] - buffers[i]
        optimizer.step()
    for p, value in zip(parameters, values, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=0)


def test_scaled_step_lars_where_a_norm_is_zero():
    zero_gradient, zero_weight = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(2, 2))
    zero_gradient.grad, zero_weight.grad = torch.zeros(2, 2), torch.ones(2, 2)
    ScaledStepLars([zero_gradient, zero_weight], lr=0.5, momentum=0.9, weight_decay=0.1, trust=0.001).step()
    torch.testing.assert_close(zero_gradient.detach(), torch.full((2, 2), 0.95))
    torch.testing.assert_close(zero_weight.detach(), torch.full((2, 2), -0.5))
