"""Learning-rate schedules: factors of the base rate by optimiser step."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol


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
