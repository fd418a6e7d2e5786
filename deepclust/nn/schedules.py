"""Learning-rate schedules: the factor of the base rate at each optimiser step."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from deepclust.number_types import Fraction, NonNegativeFloat, NonNegativeInt


@runtime_checkable  # so that a configuration can be checked
class Schedule(Protocol):
    """Maps an optimiser step to a factor of the base rate."""

    def __call__(self, step: float, steps_per_epoch: float) -> float:
        """Return the factor at `step`, counted from 1 over the whole run; an epoch has `steps_per_epoch` steps.

        Neither is whole where gradients are accumulated over the end of an epoch.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The base rate, always."""

    def __call__(self, step: float, steps_per_epoch: float) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warm-up from 0, then half a cosine that is stretched over `epochs`, the length of the whole run.

    `fractional` changes the factor at every step. Its cosine begins after the warm-up and therefore does not reach 0 at
    the end of the run. `stepwise` holds the cosine for an epoch; its warm-up leads up to the value that the cosine has
    after `warmup_epochs`. Both variants are those of ProPos's code.
    """

    warmup_epochs: NonNegativeFloat
    epochs: NonNegativeFloat
    variant: Literal["fractional", "stepwise"]

    def __call__(self, step: float, steps_per_epoch: float) -> float:
        if self.variant == "fractional":
            epoch = step / steps_per_epoch
            if epoch < self.warmup_epochs:
                return epoch / self.warmup_epochs
            return _half_cosine(_share(epoch - self.warmup_epochs, self.epochs))
        epoch_number = (step - 1) // steps_per_epoch
        if epoch_number < self.warmup_epochs:
            return step / (self.warmup_epochs * steps_per_epoch) * _half_cosine(_share(self.warmup_epochs, self.epochs))
        return _half_cosine(_share(epoch_number, self.epochs))


@dataclass(frozen=True, kw_only=True)
class DelayedWarmupCosine:
    """0 in the first epoch, then linear warm-up to 1, then half a cosine to 0 (SeCu, CoKe).

    `warmup_epochs` counts the first epoch, `epochs` is the length of the whole run.
    """

    warmup_epochs: NonNegativeInt
    epochs: NonNegativeInt

    def __call__(self, step: float, steps_per_epoch: float) -> float:
        steps_done, warmup_steps = step - 1, self.warmup_epochs * steps_per_epoch
        if steps_done < steps_per_epoch:
            return 0.0
        if steps_done < warmup_steps:
            return max(1, steps_done - steps_per_epoch) / (warmup_steps - steps_per_epoch)
        return _half_cosine((steps_done - warmup_steps) / max(1, self.epochs * steps_per_epoch - warmup_steps))


@dataclass(frozen=True, kw_only=True)
class InclusiveWarmupCosine:
    """Linear warm-up from 0 in its first step to 1 in its last, then half a cosine to `floor` (TEMI, as DINO's code).

    The cosine is stretched over the steps that are left of `epochs`, the length of the whole run, and would reach
    `floor` in the step after the last. With a floor of 1 the rate is constant after the warm-up.
    """

    warmup_epochs: NonNegativeFloat
    epochs: NonNegativeFloat
    floor: Fraction

    def __call__(self, step: float, steps_per_epoch: float) -> float:
        steps_done, warmup_steps = step - 1, self.warmup_epochs * steps_per_epoch
        if steps_done < warmup_steps:
            return min(1.0, steps_done / max(1, warmup_steps - 1))
        progress = _share(steps_done - warmup_steps, max(0, self.epochs * steps_per_epoch - warmup_steps))
        return self.floor + (1 - self.floor) * _half_cosine(min(1.0, progress))


@dataclass(frozen=True, kw_only=True)
class EpochCosine:
    """Half a cosine from 1 to `floor` that changes once per epoch (SCAN's pretext, GCC).

    It would reach `floor` in the epoch after the last of `epochs`.
    """

    epochs: NonNegativeInt
    floor: Fraction

    def __call__(self, step: float, steps_per_epoch: float) -> float:
        epoch = (step - 1) // steps_per_epoch
        return self.floor + (1 - self.floor) * _half_cosine(_share(epoch, self.epochs))


@dataclass(frozen=True, kw_only=True)
class RisingCosine:
    """Half a cosine from 0 to 1 over the run: for SeCu's prototypes on ImageNet under the entropy constraint."""

    epochs: NonNegativeInt

    def __call__(self, step: float, steps_per_epoch: float) -> float:
        return 1 - _half_cosine(_share(step - 1, self.epochs * steps_per_epoch))


def _share(done: float, total: float) -> float:
    """Return `done` as a share of `total`; 1 where the total is 0, because nothing is left to do."""
    return done / total if total else 1.0


def _half_cosine(progress: float) -> float:
    """Return a factor that falls from 1 to 0 by half a cosine while `progress` goes from 0 to 1."""
    return (1 + math.cos(math.pi * progress)) / 2
