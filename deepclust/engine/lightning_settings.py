"""Switches off what Lightning does on its own: its advice, and its handling of signals inside Slurm."""

import logging
import warnings

from lightning import Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment


def silence_lightning() -> None:
    """Hide Lightning's messages and warnings: what they advise has been decided for these runs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")


def disable_lightning_requeue(trainer: Trainer) -> None:
    """Keep Lightning from acting on SIGUSR1 inside Slurm; engine/signals.py acts on it instead.

    Lightning would write its own checkpoint into the working folder, whatever the process is doing, and every later run
    that starts in that folder would resume from it.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False
