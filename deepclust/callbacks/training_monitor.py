"""A callback that logs how fast a training is, what it takes, and how much its E-steps still change.

Each value is logged at Lightning's logging interval (`trainer.log_every_n_steps`), by every logger:

    learning_rate/GROUP        of the step, for each group of parameters, counted from 0
    speed/images_per_second    of all processes, since the last value; E-steps, evaluations and checkpoints between two
                               epochs do not count
    speed/data_seconds         that a batch was waited for, on average; the rest of the reading goes on beside training
    speed/e_step_seconds       of the last E-step, once
    memory/process_bytes       that process 0 has in memory
    memory/device_bytes        the most that its GPU has held so far, where there is one
    e_step/changed             the share of images with another cluster than after the E-step before, once
    gradients/norm             of all gradients together, if asked for

Lightning's LearningRateMonitor calls rates by the class of the optimiser, which differs between methods, and refuses
a training without a logger; its DeviceStatsMonitor logs a hundred values of a device.
"""

import time
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from deepclust.engine.memory_estimate import read_process_bytes
from deepclust.methods.base import ClusteringMethod

MAX_MATCHED_CLUSTERS = 2048  # the clusters of two E-steps are matched up to this number; it would take long for more


class TrainingMonitor(Callback):
    """Logs the values that the module lists. It draws no random numbers and changes nothing.

    Args:
        gradient_norm: whether the norm of the gradients is logged, which takes a pass over all of them.
    """

    def __init__(self, *, gradient_norm: bool) -> None:
        self.gradient_norm = gradient_norm
        self.values: dict[str, float] = {}  # to be logged at the next interval
        self.batch_began_at: float | None = None
        self.last_logged_step = 0
        self.num_images, self.num_batches, self.seconds = 0, 0, 0.0  # since the last interval
        self.waited_before, self.e_step_seconds_before = 0.0, 0.0
        self.assignments_before: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: ClusteringMethod) -> None:  # type: ignore[override]
        self.last_logged_step = trainer.global_step
        self.e_step_seconds_before = pl_module.e_step_seconds
        self.waited_before = trainer.datamodule.seconds_waited  # type: ignore[attr-defined]
        if trainer.global_step and trainer.is_global_zero:  # a run that goes on
            self.assignments_before = copy_assignments(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.e_step_seconds != self.e_step_seconds_before:
            self.note_e_step(trainer, pl_module)
        if is_logged(trainer, trainer.global_step + 1):
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            self.values |= {f"learning_rate/{number}": group["lr"] for number, group in enumerate(groups)}
        if self.batch_began_at is None:
            self.batch_began_at = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        if self.gradient_norm and is_logged(trainer, trainer.global_step + 1):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.values["gradients/norm"] = float(get_total_norm(gradients))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        assert self.batch_began_at is not None
        self.seconds += now - self.batch_began_at
        self.num_images += batch.draws.global_batch_size
        self.num_batches += 1
        self.batch_began_at = now
        if trainer.global_step > self.last_logged_step and is_logged(trainer, trainer.global_step):
            self.last_logged_step = trainer.global_step
            waited = trainer.datamodule.seconds_waited  # type: ignore[attr-defined]
            self.values["speed/images_per_second"] = self.num_images / max(self.seconds, 1e-9)
            self.values["speed/data_seconds"] = (waited - self.waited_before) / self.num_batches
            if (process_bytes := read_process_bytes()) is not None:
                self.values["memory/process_bytes"] = float(process_bytes)
            if pl_module.device.type == "cuda":  # reserved: CUDA graphs count, which allocate nothing
                self.values["memory/device_bytes"] = float(torch.cuda.max_memory_reserved(pl_module.device))
            # Not by `pl_module.log`, which would repeat what is told once until the end of the epoch.
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # that of the other values of this batch
            for logger in trainer.loggers:
                logger.log_metrics(self.values, step)
            self.values, self.waited_before = {}, waited
            self.num_images, self.num_batches, self.seconds = 0, 0, 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: ClusteringMethod) -> None:  # type: ignore[override]
        self.batch_began_at = None  # what lies between two epochs is no time of a batch

    def note_e_step(self, trainer: Trainer, method: ClusteringMethod) -> None:
        """Keep for the next interval how long the last E-step took, and what it has changed."""
        self.values["speed/e_step_seconds"] = method.e_step_seconds - self.e_step_seconds_before
        self.e_step_seconds_before = method.e_step_seconds
        if not trainer.is_global_zero or (assignments := copy_assignments(method)) is None:
            return
        if self.assignments_before is not None:
            changed = share_of_changed(self.assignments_before, assignments)
            if changed is not None:
                self.values["e_step/changed"] = changed
        self.assignments_before = assignments


def is_logged(trainer: Trainer, step: int) -> bool:
    """Return whether the values of a step (from 1) are logged."""
    return step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def copy_assignments(method: ClusteringMethod) -> Tensor | None:
    """Return a copy of `e_step_assignments` of a method, int32 (M,), on the CPU; None if it has none."""
    assignments = method.e_step_assignments()
    return None if assignments is None else assignments.detach().to("cpu", torch.int32, copy=True)


def share_of_changed(before: Tensor, after: Tensor) -> float | None:
    """Return the share of images (M,) that are in another cluster, whatever numbers the clusters have.

    An E-step that begins anew, as k-means does, numbers the clusters as it comes. So the clusters of both are matched
    one to one, such that the most images stay. None for more than MAX_MATCHED_CLUSTERS.
    """
    num_clusters = int(torch.maximum(before.max(), after.max())) + 1
    if num_clusters > MAX_MATCHED_CLUSTERS:
        return None
    pairs = before.numpy().astype(np.int64) * num_clusters + after.numpy()
    counts = np.bincount(pairs, minlength=num_clusters**2).reshape(num_clusters, num_clusters)
    return 1 - int(counts[linear_sum_assignment(counts, maximize=True)].sum()) / len(pairs)
