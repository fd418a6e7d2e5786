"""Learning-rate schedules, as factors of the base rate by optimiser step; LARS."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal, Protocol

import torch
from torch.optim import Optimizer


class Schedule(Protocol):
    """A factor of the base rate; `step` counts from 1, `steps_per_epoch` optimiser steps make an epoch."""

    def __call__(self, step: int, steps_per_epoch: int) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The base rate, always."""

    def __call__(self, step: int, steps_per_epoch: int) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warm-up from 0, then half a cosine whose argument is divided by the length of the whole run.

    The rate therefore does not reach 0 at the end. `fractional` moves with every step; `stepwise` holds the cosine for
    an epoch and lets the warm-up end where the cosine of the warm-up's last epoch stands. Both are ProPos's.
    """

    warmup_epochs: float
    epochs: float
    variant: Literal["fractional", "stepwise"]

    def __call__(self, step: int, steps_per_epoch: int) -> float:
        if self.variant == "fractional":
            epoch = step / steps_per_epoch
            if epoch < self.warmup_epochs:
                return epoch / self.warmup_epochs
            return _half_cosine((epoch - self.warmup_epochs) / self.epochs)
        whole = (step - 1) // steps_per_epoch
        if whole < self.warmup_epochs:
            return step / (self.warmup_epochs * steps_per_epoch) * _half_cosine(self.warmup_epochs / self.epochs)
        return _half_cosine(whole / self.epochs)


@dataclass(frozen=True, kw_only=True)
class DeadEpochCosine:
    """0 for an epoch, linear to 1 until `warmup_epochs` (the dead one counted), then half a cosine to 0 (SeCu,
    CoKe)."""

    warmup_epochs: int
    epochs: int

    def __call__(self, step: int, steps_per_epoch: int) -> float:
        done, warm = step - 1, self.warmup_epochs * steps_per_epoch
        if done < steps_per_epoch:
            return 0.0
        if done < warm:
            return max(1, done - steps_per_epoch) / (warm - steps_per_epoch)
        return _half_cosine((done - warm) / max(1, self.epochs * steps_per_epoch - warm))


@dataclass(frozen=True, kw_only=True)
class EpochCosine:
    """Half a cosine from 1 to `floor`, where epoch `epochs` (from 0) would stand; held for an epoch (SCAN's pretext,
    GCC)."""

    epochs: int
    floor: float

    def __call__(self, step: int, steps_per_epoch: int) -> float:
        epoch = (step - 1) // steps_per_epoch
        return self.floor + (1 - self.floor) * _half_cosine(epoch / self.epochs)


@dataclass(frozen=True, kw_only=True)
class RisingCosine:
    """Half a cosine from 0 to 1 over the run: SeCu's prototypes on ImageNet under the entropy rule."""

    epochs: int

    def __call__(self, step: int, steps_per_epoch: int) -> float:
        return 1 - _half_cosine((step - 1) / (self.epochs * steps_per_epoch))


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def fused(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """`make` with torch's step in one kernel, where the optimiser that it makes has one; the same but for rounding."""
    return partial(make, fused=True) if "fused" in signature(make).parameters else make


class Lars(Optimizer):
    """SGD with momentum where the step of each matrix goes by the length of its weights (You et al., arXiv 1708.03888).

    For tensors p of more than one dimension, with d = g + `weight_decay` p, the gradient g becomes `trust` |p| / |d| d,
    or d where a length is 0; others keep g. Then m <- `momentum` m + g and p <- p - lr m. (timm's divides by
    |g| + weight_decay |p| instead of |d|.)
    """

    def __init__(self, params: Any, *, lr: float, momentum: float, weight_decay: float, trust: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; gives what `closure` gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                gradient = p.grad
                if p.dim() > 1:
                    gradient = gradient.add(p, alpha=group["weight_decay"])
                    length, size = p.norm(), gradient.norm()
                    scale = torch.where((length > 0) & (size > 0), group["trust"] * length / size, 1.0)
                    gradient = gradient * scale
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                p.sub_(state["momentum_buffer"], alpha=group["lr"])
        return loss
