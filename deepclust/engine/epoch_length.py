"""How many batches and steps an epoch has where arguments of Lightning's trainer cut training short."""

import math
from typing import Any

from lightning import Trainer


def limit_batches(num_batches: int, limit: float) -> int:
    """Return how many of the batches of an epoch the trainer takes: up to `limit`, or its share where it is a float."""
    return min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)


def count_batches_taken(trainer: Any, num_batches: int) -> int:
    """Return how many of `num_batches` the trainer takes in an epoch.

    What stands in for a trainer outside of training takes all, unless it has a limit too.
    """
    return limit_batches(num_batches, getattr(trainer, "limit_train_batches", 1.0))


def count_steps_per_epoch(trainer: Any, num_batches: int) -> float:
    """Return the number of optimiser steps in an epoch of `num_batches`, for schedules that end with the run.

    Without limits of the trainer, an optimiser step that two epochs share counts in parts. With
    `trainer.limit_train_batches` every epoch ends with a step of its own. With `trainer.max_steps` the last epoch is
    cut short; then all epochs count as equally long, so that they add up to the steps that are made.
    """
    num_accumulated = trainer.accumulate_grad_batches
    num_taken, steps = count_batches_taken(trainer, num_batches), num_batches / num_accumulated
    if num_taken < num_batches:
        steps = math.ceil(num_taken / num_accumulated)
    if isinstance(trainer, Trainer) and trainer.max_steps > 0:
        num_epochs = min(math.ceil(trainer.max_steps / max(steps, 1)), trainer.max_epochs or 1)
        steps = min(steps, trainer.max_steps / num_epochs)
    return max(1, steps)
