"""How far training is, and how long it will take."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from deepclust.engine.progress import Work

NOTED = ("train/loss", "eval/method/acc", "eval/cluster_size_entropy")


class TrainingProgress(Callback):
    """One bar over the whole run on a terminal; elsewhere a line every `line_every_seconds` at most."""

    def __init__(self, *, line_every_seconds: float) -> None:
        self.line_every_seconds = line_every_seconds
        self.work: Work | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = int(trainer.estimated_stepping_batches)
        self.work = Work("training", steps, done=trainer.global_step, line_every=self.line_every_seconds)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.work is not None
        self.work.reach(trainer.global_step, lambda: note(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        if self.work is not None:
            self.work.close()


def note(trainer: Trainer) -> str:
    """The epoch, and the latest of the figures that say most."""
    figures = [
        f"{name.removeprefix('eval/').replace('/', ' ')} {float(value):.3f}"
        for name, value in trainer.callback_metrics.items()
        if name in NOTED
    ]
    return "  ".join([f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", *figures])
