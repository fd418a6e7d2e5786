"""A callback that ends the process in the middle of an epoch, as a crash does."""

import os
from typing import Any

from lightning import Callback


class StopAtStep(Callback):
    def __init__(self, *, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            os._exit(9)
