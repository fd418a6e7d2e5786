"""Several optimisers as one: the same weights as with each by itself, and a state that can be saved."""

import copy
from functools import partial

import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

from deepclust.nn.optimizer_per_group import OptimizerPerGroup

MAKERS = (partial(Adam, lr=0.1), partial(SGD, lr=0.05, momentum=0.9))


def make_parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3)) for _ in range(2)]


def take_step(optimizers, parameters, number):
    """Take a step in which every second one rests, for its gradient is None."""
    for i, p in enumerate(parameters):
        p.grad = None if (number + i) % 2 else torch.sin(p.detach() * (number + 1))
    for optimizer in optimizers:
        optimizer.step()


def make_joint(parameters):
    return OptimizerPerGroup([{"params": [p]} for p in parameters], makers=MAKERS)


def test_each_group_moves_as_by_its_own_optimiser_also_after_loading():
    expected, parameters = make_parameters(), make_parameters()
    alone = [make([p]) for make, p in zip(MAKERS, expected, strict=True)]
    joint = make_joint(parameters)
    for number in range(8):
        if number == 5:
            saved = copy.deepcopy(joint.state_dict())
            joint = make_joint(parameters)
            joint.load_state_dict(saved)
        take_step(alone, expected, number)
        take_step([joint], parameters, number)
    for p, value in zip(parameters, expected, strict=True):
        assert torch.equal(p, value)
    assert len(joint.state) == 2 and joint.state[parameters[1]].keys() == {"momentum_buffer"}


def test_rates_that_a_schedule_sets_hold_in_each_optimiser_also_after_loading():
    parameters = make_parameters()
    joint = make_joint(parameters)
    for load in (False, True):
        if load:
            joint.load_state_dict(joint.state_dict())
        scheduler = LambdaLR(joint, lambda step: 0.5**step)
        joint.step()
        scheduler.step()
        assert [o.param_groups[0]["lr"] for o in joint.optimizers] == [0.1 * 0.5, 0.05 * 0.5]
        for group in joint.param_groups:
            group["lr"] *= 2


def test_a_closure_is_called_once_with_gradients():
    parameters, calls = make_parameters(), []
    joint = make_joint(parameters)

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = sum(p.square().sum() for p in parameters)
        loss.backward()
        return loss

    assert joint.step(closure) > 0 and calls == [True]
    joint.zero_grad()
    assert all(p.grad is None for p in parameters)
