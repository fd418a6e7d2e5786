"""Arguments of the trainer that cut a run short: one is refused, another shortens the schedules of the run."""

import copy
import math

from omegaconf import DictConfig

from deepclust.engine.epoch_length import limit_batches
from deepclust.errors import InputError


def refuse_fast_dev_run(cfg: DictConfig) -> None:
    """Check that the trainer is not asked for a trial that leaves no run behind.

    Raises:
        InputError: for `trainer.fast_dev_run`, with which Lightning writes neither checkpoints nor metrics.
    """
    if cfg.trainer.get("fast_dev_run"):
        raise InputError(
            f"trainer.fast_dev_run is {cfg.trainer.fast_dev_run}, a trial that would count as a finished run",
            expected="a short run in its place",
            do="leave it out and write trainer.max_epochs=1 +trainer.limit_train_batches=1",
        )


def lower_max_epochs_to_max_steps(cfg: DictConfig, batches_per_epoch: int) -> DictConfig:
    """Return the configuration with `trainer.max_epochs` lowered to the epochs that `trainer.max_steps` allows.

    Schedules are stretched over `trainer.max_epochs`. `batches_per_epoch` is their number without a limit of the
    trainer.
    """
    max_steps = cfg.trainer.get("max_steps")
    if max_steps is None or max_steps < 0:
        return cfg
    cfg = copy.deepcopy(cfg)
    limit = cfg.trainer.get("overfit_batches") or cfg.trainer.get("limit_train_batches")
    num_batches = batches_per_epoch if limit is None else limit_batches(batches_per_epoch, limit)
    steps_per_epoch = max(math.ceil(num_batches / (cfg.trainer.get("accumulate_grad_batches") or 1)), 1)
    cfg.trainer.max_epochs = min(cfg.trainer.max_epochs, math.ceil(max_steps / steps_per_epoch))
    return cfg
