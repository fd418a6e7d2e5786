"""A callback that shows how far training is and how long it will take."""

import logging
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer

from deepclust.engine.durations import format_duration
from deepclust.engine.progress_bar import ProgressMeter
from deepclust.number_types import NonNegativeFloat

log = logging.getLogger(__name__)

SECONDS_BEFORE_COST, BATCHES_BEFORE_COST = 10.0, 2  # that are timed before a training is judged
SECONDS_THAT_ARE_LONG = 3600.0
# Names of the metrics that are shown, and whether they are fractions: those are percent wherever people read them.
SHOWN_METRICS = {"train/loss": False, "eval/method/acc": True, "eval/cluster_size_entropy": True}


class TrainingProgress(Callback):
    """Shows one bar over the whole run on a terminal, and elsewhere a line every `line_every_seconds` at most.

    Where the first batches tell that a training on the CPU will take hours, a line says so, and what takes less.

    Args:
        line_every_seconds: where the output is no terminal.
        shorter_ways: what to do in place of a training that takes too long; None: nothing is known.
    """

    def __init__(self, *, line_every_seconds: NonNegativeFloat, shorter_ways: str | None = None) -> None:
        self.line_every_seconds = line_every_seconds
        self.shorter_ways = shorter_ways
        self.meter: ProgressMeter | None = None
        self.first_batch_ended_at: float | None = None  # which is slower than the others, and counts for nothing
        self.num_batches_timed = 0
        self.is_cost_told = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = int(trainer.estimated_stepping_batches)
        self.meter = ProgressMeter(
            "training", steps, done=trainer.global_step, seconds_between_lines=self.line_every_seconds
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.meter is not None
        self.meter.update(trainer.global_step, lambda: format_status(trainer))
        if not self.is_cost_told:
            self.tell_cost(trainer, pl_module.device.type)

    def tell_cost(self, trainer: Trainer, device_type: str) -> None:
        """Tell once, after some batches, what an epoch and the training will take, if that is long."""
        now = time.monotonic()
        if self.first_batch_ended_at is None:
            self.first_batch_ended_at = now
            return
        self.num_batches_timed += 1
        seconds = now - self.first_batch_ended_at
        if seconds < SECONDS_BEFORE_COST or self.num_batches_timed < BATCHES_BEFORE_COST:
            return
        self.is_cost_told = True
        epoch_seconds = seconds / self.num_batches_timed * float(trainer.num_training_batches)
        total_seconds = epoch_seconds * ((trainer.max_epochs or 0) - trainer.current_epoch)
        if total_seconds > SECONDS_THAT_ARE_LONG and device_type == "cpu" and trainer.is_global_zero:
            log.warning(
                "an epoch takes about %s on this CPU, and all %d take %s%s",
                *(format_duration(epoch_seconds), trainer.max_epochs, format_duration(total_seconds)),
                f". Faster: {self.shorter_ways}" if self.shorter_ways else "",
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close_meter()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close_meter()

    def close_meter(self) -> None:
        if self.meter is not None:
            self.meter.close()


def format_status(trainer: Trainer) -> str:
    """Return the current epoch and the latest values of SHOWN_METRICS as one line."""
    values = []
    for name, value in trainer.callback_metrics.items():
        if name in SHOWN_METRICS:
            number = f"{100 * float(value):.1f} %" if SHOWN_METRICS[name] else f"{float(value):.3f}"
            values.append(f"{name.removeprefix('eval/').replace('/', ' ')} {number}")
    return "  ".join([f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", *values])
