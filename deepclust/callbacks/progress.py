"""How far training is, how fast, and how long it will take."""

import sys
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress(Callback):
    """One bar over the whole run on a terminal; elsewhere a line every `line_every_seconds`. Writes to standard
    output."""

    def __init__(self, *, line_every_seconds: float) -> None:
        self.line_every_seconds = line_every_seconds
        self.shown_at = 0.0
        self.bar: Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started_at, self.first_step = time.monotonic(), trainer.global_step
        self.steps = trainer.estimated_stepping_batches
        if sys.stdout.isatty() and trainer.is_global_zero:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[what]}"),
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task("training", total=self.steps, completed=trainer.global_step, what="")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        if now - self.shown_at < (0.2 if self.bar else self.line_every_seconds) or not trainer.is_global_zero:
            return
        self.shown_at = now
        what = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        what += "".join(
            f"  {name.removeprefix('eval/').replace('/', ' ')} {float(value):.3f}"
            for name, value in trainer.callback_metrics.items()
            if name in ("train/loss", "eval/method/acc", "eval/cluster_size_entropy")
        )
        if self.bar:
            self.bar.update(self.task, completed=trainer.global_step, what=what)
            return
        done = trainer.global_step - self.first_step
        left = (now - self.started_at) / max(done, 1) * (self.steps - trainer.global_step)
        print(f"training {trainer.global_step / self.steps:4.0%}  {what}  {left / 60:.1f} min left", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
