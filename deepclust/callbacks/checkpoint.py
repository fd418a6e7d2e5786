"""One checkpoint, always the newest, from which a run goes on bit for bit."""

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import distributed as dist

from deepclust.engine.signals import StopRequest
from deepclust.methods.base import ClusteringMethod

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 2  # raised where checkpoints of before can no longer be read


class LastCheckpoint(Checkpoint):
    """Keeps `folder`/checkpoints/last.ckpt: at the end of an epoch, and every `every_n_steps` steps (0: never) within
    one.

    Not more often than every `min_seconds`, for a checkpoint of a small step would cost more than the step; how often
    one is written changes nothing in what is learned. Written beside and renamed, so that a kill never leaves half a
    file. Random numbers need no saving: they are a function of the seed and the position in training.

    Asked by a signal to stop, it writes one after the batch at hand, or leaves it after `stop_patience` seconds.
    """

    def __init__(
        self,
        *,
        folder: Path,
        config: dict[str, Any],
        every_n_steps: int,
        min_seconds: float,
        stop_patience: float,
    ) -> None:
        self.path = Path(folder) / "checkpoints" / "last.ckpt"
        self.config = config
        self.every_n_steps = every_n_steps
        self.min_seconds = min_seconds
        self.stop = StopRequest(patience=stop_patience)
        self.saved_at = time.monotonic()
        self.started_at = time.monotonic()
        self.seconds_before = 0.0
        self.more: dict[str, Any] = {}

    @property
    def train_seconds(self) -> float:
        """Wall time of training so far, earlier starts included."""
        return self.seconds_before + time.monotonic() - self.started_at

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.stop.remember()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started_at = self.saved_at = time.monotonic()
        self.stop.watch()  # in place of Lightning's, which for SIGTERM talks to the other processes in mid-batch

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        last = batch_idx + 1 == trainer.num_training_batches  # the end of the epoch saves
        stepped = trainer.global_step > 0 and (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not stepped or last:
            return
        self.stop_if_asked(trainer, pl_module)
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self.save_if_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: ClusteringMethod) -> None:  # type: ignore[override]
        self.stop_if_asked(trainer, pl_module)
        self.save_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: ClusteringMethod) -> None:  # type: ignore[override]
        self.stop_if_asked(trainer, pl_module)
        self.stop.unwatch()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop.unwatch()

    def stop_if_asked(self, trainer: Trainer, pl_module: ClusteringMethod) -> None:
        """Save and stop where a signal has come to any process."""
        if not (numbers := self.stop.agreed(pl_module.device)):
            return
        self.save(trainer, pl_module)
        if trainer.is_global_zero:
            names = " and ".join(signal.Signals(number).name for number in numbers)
            log.warning(
                "%s: saved %s at step %d, where the same command goes on", names, self.path, trainer.global_step
            )
        self.stop.act(numbers, pl_module.device)

    def save_if_due(self, trainer: Trainer, pl_module: ClusteringMethod) -> None:
        due = torch.tensor(time.monotonic() - self.saved_at >= self.min_seconds, device=pl_module.device)
        if dist.is_initialized():
            dist.broadcast(due, 0)
        if due:
            self.save(trainer, pl_module)

    def save(self, trainer: Trainer, pl_module: ClusteringMethod, **more: Any) -> None:
        """Write the checkpoint now, with `more` in it."""
        self.more = more
        pl_module.check_finite()
        for logger in trainer.loggers:
            logger.save()  # what was logged before a checkpoint must outlive it
        beside = self.path.with_suffix(".writing")
        trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            os.replace(beside, self.path)
        self.saved_at = time.monotonic()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(self.more, format=CHECKPOINT_FORMAT, config=self.config)
        checkpoint["train_seconds"] = self.train_seconds
        checkpoint["e_step_seconds"] = pl_module.e_step_seconds

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.seconds_before = checkpoint["train_seconds"]
        pl_module.e_step_seconds = checkpoint["e_step_seconds"]
