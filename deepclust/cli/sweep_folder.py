"""A callback of Hydra that makes the folder of a sweep before the sweeper begins."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepFolder(Callback):
    """Makes the folder of a sweep, in which a search keeps its trials: Hydra makes it with the first job only."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
