"""What Lightning does of itself and must not do here."""

import logging
import warnings

from lightning import Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment


def silence_lightning() -> None:
    """Hide Lightning's advice: what it says of this set-up is known and decided."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")


def disable_lightning_requeue(trainer: Trainer) -> None:
    """Keep Lightning from acting on SIGUSR1 inside Slurm.

    It would write a checkpoint of its own into the working folder, whatever the process is doing, and every later run
    that starts there would take it for its own.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False
