"""A callback that writes how far training is into the run folder, for `deepclust sweep`."""

import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from deepclust.engine.run_status import update_status

SECONDS_BETWEEN_WRITES = 15.0  # within an epoch
SECONDS_BETWEEN_EPOCHS = 1.0  # at least so long between the writes of short epochs
SCORE_DURING_TRAINING = "eval/cluster_size_entropy"  # which needs no labels


class RunStatus(Callback):
    """Writes epoch, label-free score, images per second and time left into `folder`/status.json, on process 0.

    It does so at the end of each epoch, and within long ones now and then. It reads a clock at each batch, and nothing
    of what is computed but the latest score.
    """

    def __init__(self, *, folder: Path) -> None:
        self.folder = Path(folder)
        self.num_images = 0  # seen since the start, on all processes
        self.first_step = 0
        self.started_at = self.written_at = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.num_images, self.first_step = 0, trainer.global_step
        self.started_at = time.monotonic()
        self.write(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.num_images += len(batch.indices) * trainer.world_size
        if time.monotonic() - self.written_at >= SECONDS_BETWEEN_WRITES:
            self.write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if time.monotonic() - self.written_at >= SECONDS_BETWEEN_EPOCHS:
            self.write(trainer, epochs_done=trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer)

    def write(self, trainer: Trainer, *, epochs_done: int | None = None) -> None:
        """Write the status now; `epochs_done` is that of the trainer, unless it is at the end of an epoch."""
        self.written_at = time.monotonic()
        if not trainer.is_global_zero:
            return
        elapsed = self.written_at - self.started_at
        steps = trainer.global_step - self.first_step
        steps_left = float(trainer.estimated_stepping_batches) - trainer.global_step
        score = trainer.callback_metrics.get(SCORE_DURING_TRAINING)
        values: dict[str, Any] = {} if score is None else {"score": float(score), "score_name": SCORE_DURING_TRAINING}
        update_status(
            self.folder,
            epoch=trainer.current_epoch if epochs_done is None else epochs_done,
            epochs=trainer.max_epochs,
            images_per_second=self.num_images / elapsed if steps else None,
            seconds_left=elapsed / steps * steps_left if steps else None,
            **values,
        )
