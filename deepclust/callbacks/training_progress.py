"""A callback that shows how far training is and how long it will take."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from deepclust.engine.progress import ProgressMeter
from deepclust.number_types import NonNegativeFloat

SHOWN_METRICS = ("train/loss", "eval/method/acc", "eval/cluster_size_entropy")


class TrainingProgress(Callback):
    """Shows one bar over the whole run on a terminal, and elsewhere a line every `line_every_seconds` at most."""

    def __init__(self, *, line_every_seconds: NonNegativeFloat) -> None:
        self.line_every_seconds = line_every_seconds
        self.meter: ProgressMeter | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = int(trainer.estimated_stepping_batches)
        self.meter = ProgressMeter(
            "training", steps, done=trainer.global_step, seconds_between_lines=self.line_every_seconds
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.meter is not None
        self.meter.update(trainer.global_step, lambda: format_status(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close_meter()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close_meter()

    def close_meter(self) -> None:
        if self.meter is not None:
            self.meter.close()


def format_status(trainer: Trainer) -> str:
    """Return the current epoch and the latest values of SHOWN_METRICS as one line."""
    values = [
        f"{name.removeprefix('eval/').replace('/', ' ')} {float(value):.3f}"
        for name, value in trainer.callback_metrics.items()
        if name in SHOWN_METRICS
    ]
    return "  ".join([f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", *values])
