"""A callback that keeps one checkpoint, the newest, from which a run resumes bit for bit."""

import io
import logging
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import distributed as dist

from deepclust.engine.output_files import check_folder_is_there, name_file_in_errors, name_while_written
from deepclust.engine.signals import StopSignals
from deepclust.methods.base import ClusteringMethod
from deepclust.number_types import NonNegativeFloat, NonNegativeInt

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 2  # raised whenever earlier checkpoints can no longer be read


class CheckpointFile(TorchCheckpointIO):
    """Writes a checkpoint straight to its place.

    Lightning writes it into the folder for temporary files first, which may be too small for it, and moves it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(buffer.getbuffer())


class LastCheckpoint(Checkpoint):
    """Writes `folder`/checkpoints/last.ckpt at the end of each epoch and every `every_n_steps` steps within one.

    With `every_n_steps` 0 it writes at the end of epochs only, and never more often than every `min_seconds`, since the
    checkpoint of a small network costs more than a step. How often one is written does not change what is learned. The
    state of random generators is not saved: draws depend only on the seed and the position in training. The file is
    written under another name and renamed, so that a kill never leaves half a file.

    When a signal asks the run to stop, the checkpoint is written after the current batch; if that batch does not end
    within `stop_patience` seconds, the run stops without one.

    Args:
        folder: the run folder.
        config: the resolved configuration, which is saved in the checkpoint.
        going_on: what to type so that a stopped run goes on; None where nobody knows.
    """

    def __init__(
        self,
        *,
        folder: Path,
        config: dict[str, Any],
        every_n_steps: NonNegativeInt,
        min_seconds: NonNegativeFloat,
        stop_patience: NonNegativeFloat,
        going_on: str | None = None,
    ) -> None:
        self.path = Path(folder) / "checkpoints" / "last.ckpt"
        self.config = config
        self.going_on = going_on or f"the same command with {shlex.quote(f'hydra.run.dir={folder}')}"
        self.every_n_steps = every_n_steps
        self.min_seconds = min_seconds
        self.stop_signals = StopSignals(patience=stop_patience)
        self.started_at = time.monotonic()
        self.last_saved_at = time.monotonic()
        self.earlier_train_seconds = 0.0  # of the earlier starts of a resumed run
        self.extra_entries: dict[str, Any] = {}

    @property
    def train_seconds(self) -> float:
        """Wall time of training so far, earlier starts of a resumed run included."""
        return self.earlier_train_seconds + time.monotonic() - self.started_at

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.stop_signals.save_original_handlers()
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFile()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started_at = self.last_saved_at = time.monotonic()
        if trainer.ckpt_path is not None and trainer.is_global_zero:
            log.info("goes on at epoch %d of %d, from %s", trainer.current_epoch + 1, trainer.max_epochs, self.path)
        # This replaces Lightning's own handlers. Its handler of SIGTERM communicates between processes in mid-batch.
        self.stop_signals.start_watching()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        is_last = batch_idx + 1 == trainer.num_training_batches  # then the end of the epoch saves
        has_stepped = trainer.global_step > 0 and (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not has_stepped or is_last:
            return
        self.stop_if_signalled(trainer, pl_module)
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self.save_if_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: ClusteringMethod) -> None:  # type: ignore[override]
        self.stop_if_signalled(trainer, pl_module)
        self.save_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: ClusteringMethod) -> None:  # type: ignore[override]
        self.stop_if_signalled(trainer, pl_module)
        self.stop_signals.stop_watching()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop_signals.stop_watching()

    def stop_if_signalled(self, trainer: Trainer, pl_module: ClusteringMethod) -> None:
        """Save and stop if any process has received a signal that asks to stop."""
        if not (numbers := self.stop_signals.received_by_any_process(pl_module.device)):
            return
        self.save(trainer, pl_module)
        if trainer.is_global_zero:
            names = " and ".join(signal.Signals(number).name for number in numbers)
            log.warning("%s: saved %s at step %d; to go on: %s", names, self.path, trainer.global_step, self.going_on)
        self.stop_signals.take_effect(numbers, pl_module.device)

    def save_if_due(self, trainer: Trainer, pl_module: ClusteringMethod) -> None:
        """Save if the last checkpoint is `min_seconds` old; the clock of process 0 decides for all."""
        is_due = torch.tensor(time.monotonic() - self.last_saved_at >= self.min_seconds, device=pl_module.device)
        if dist.is_initialized():
            dist.broadcast(is_due, 0)
        if is_due:
            self.save(trainer, pl_module)

    def save(self, trainer: Trainer, pl_module: ClusteringMethod, **extra_entries: Any) -> None:
        """Write the checkpoint now, with `extra_entries` in it.

        Raises:
            InputError: if a loss or a weight is not finite, for such weights are never saved; or if the run folder has
                gone.
        """
        self.extra_entries = extra_entries
        pl_module.check_losses_are_finite()
        pl_module.check_weights_are_finite()
        if trainer.is_global_zero:  # Lightning would make the folder anew
            check_folder_is_there(self.path.parent.parent)
        for logger in trainer.loggers:
            logger.save()  # a run that resumes from this checkpoint needs what was logged before it
        temporary = name_while_written(self.path)
        try:
            with name_file_in_errors(self.path):
                trainer.save_checkpoint(temporary)
                if trainer.is_global_zero:
                    os.replace(temporary, self.path)
        finally:
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)  # of a full disk
        self.last_saved_at = time.monotonic()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(self.extra_entries, format=CHECKPOINT_FORMAT, config=self.config)
        checkpoint["train_seconds"] = self.train_seconds
        checkpoint["e_step_seconds"] = pl_module.e_step_seconds

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.earlier_train_seconds = checkpoint["train_seconds"]
        pl_module.e_step_seconds = checkpoint["e_step_seconds"]
