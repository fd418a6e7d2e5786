"""Training by the framework, by a bare loop and by `ProPosByHand`, in turns and timed; shared by several scripts."""

import statistics
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.plugins.precision import DoublePrecision
from measure import compose_train, default_overrides, synchronize
from omegaconf import DictConfig, OmegaConf
from propos_by_hand import ProPosByHand
from torch import Tensor

from deepclust.batch import TrainBatch
from deepclust.commands.train import run
from deepclust.config.build import build
from deepclust.datasets.datamodule import prefetch
from deepclust.methods.base import ClusteringMethod
from deepclust.runs.assemble import build_datamodule, build_evaluator, build_method, build_trainer, prepare_for_hardware
from deepclust.runs.checkpoint import load_checkpoint, load_method
from deepclust.runs.earlier_stage import find_earlier_run
from deepclust.runs.resolve_config import resolve_config

UNTIMED_EPOCHS = 2  # in the first two epochs the trainer starts, code is compiled and CUDA graphs are recorded


def compose_short_run(method: str, overrides: list[str], *, batches: int, epochs: int, folder: Path) -> DictConfig:
    """Return the configuration of a run of `epochs` epochs of `batches` batches.

    If the method starts from an earlier stage, one epoch of that stage is trained here, in `folder`.
    """
    cfg = compose_train(*default_overrides(), f"method={method}", f"+trainer.limit_train_batches={batches}", *overrides)
    for stage_cfg in (cfg, cfg.before):
        if stage_cfg is not None:
            OmegaConf.update(stage_cfg, "trainer.max_epochs", epochs if stage_cfg is cfg else 1, force_add=True)
    cfg.callbacks.evaluation.every_n_epochs = epochs + 1
    cfg.callbacks.progress.line_every_seconds = 1e9
    cfg.report.map_points = 0
    if "warmup_epochs" in cfg.method:
        cfg.method.warmup_epochs = 1  # so that the timed epochs train the whole objective
    (folder / method).mkdir(parents=True)
    earlier = find_earlier_run(cfg, folder / method, run_stage=run)
    cfg.start = None if earlier is None else earlier["run"]
    return cfg


class TrainingSetup:
    """The images, the data module and the method of a configuration, as a run has them before its first step."""

    def __init__(self, cfg: DictConfig) -> None:
        earlier = find_earlier_run(cfg, Path(), run_stage=run)  # trained by `compose_short_run` already
        self.images = build(cfg.dataset.source)
        self.cfg, _ = resolve_config(cfg, self.images, earlier)
        self.datamodule = build_datamodule(self.cfg, self.images)
        self.method: ClusteringMethod = build_method(self.cfg)
        if earlier is not None:
            self.method.start_from(load_method(load_checkpoint(Path(earlier["run"])))[1])
        prepare_for_hardware(self.cfg, self.method, self.datamodule)

    def make_trainer(self, folder: Path, *extra_callbacks: Callback, **arguments: Any) -> Any:
        """Return the trainer of `deepclust train`, with its callbacks, its logger and `extra_callbacks`."""
        evaluator = build_evaluator(self.cfg, self.images)
        return build_trainer(self.cfg, folder, evaluator, extra_callbacks, **arguments)


class BareLoop:
    """Training without Lightning, callbacks and logger: read, make views, compute losses, backward, optimizer step."""

    def __init__(self, setup: TrainingSetup, device: torch.device, batches: int) -> None:
        self.method, self.datamodule, self.device = setup.method.to(device), setup.datamodule, device
        if "64" in str(setup.cfg.hardware.precision):
            self.method.double()
        self.use_bfloat16 = "bf16" in str(setup.cfg.hardware.precision)
        # What methods and the data module read from Lightning's trainer.
        self.trainer = SimpleNamespace(
            lightning_module=self.method,
            datamodule=self.datamodule,
            strategy=SimpleNamespace(root_device=device),
            precision_plugin=SimpleNamespace(forward_context=self.forward_context),
            accumulate_grad_batches=1,
            max_epochs=setup.cfg.trainer.max_epochs,
            limit_train_batches=batches,
            num_training_batches=batches,
            current_epoch=0,
            global_step=0,
        )
        self.method._trainer = self.datamodule.trainer = self.trainer  # type: ignore[assignment]
        self.method.log = lambda *_, **__: None  # type: ignore[method-assign]
        self.datamodule.setup("fit")
        self.method.on_train_start()
        configured = self.method.configure_optimizers()
        self.optimizer, self.scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        self.batches = batches
        self.method.train()

    def forward_context(self) -> Any:
        """Return the context of a forward pass in the precision of the run."""
        if self.method.weight_dtype == torch.float64:
            return DoublePrecision().forward_context()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bfloat16)

    def run_epoch(self) -> float:
        """Train one epoch and return the seconds of its steps, without the E-step."""
        epoch = self.trainer.current_epoch
        self.method.on_train_epoch_start()
        indices = self.datamodule.draw_epoch_batches(epoch, self.method.sampling_weights())[: self.batches]
        synchronize(self.device)
        start = time.perf_counter()
        for raw_batch in prefetch(
            lambda i=i, n=n: self.datamodule.read_batch(i, epoch, n) for n, i in enumerate(indices)
        ):
            self.run_step(raw_batch)
        synchronize(self.device)
        self.trainer.current_epoch += 1
        return time.perf_counter() - start

    def run_step(self, raw_batch: Any) -> None:
        """Train on one batch as the loader reads it."""
        for name, value in vars(raw_batch).items():
            if isinstance(value, Tensor):
                setattr(raw_batch, name, value.to(self.device, non_blocking=True))
        batch = self.datamodule.on_after_batch_transfer(raw_batch, 0)
        batch.draws.seed_layers(self.device, 0)
        self.optimizer.zero_grad()
        with self.forward_context():
            loss = self.compute_loss(batch)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.trainer.global_step += 1

    def compute_loss(self, batch: TrainBatch) -> Tensor:
        """Return the sum of the loss terms."""
        return torch.stack(list(self.method.losses(batch).values())).sum()


class ByHandLoop(BareLoop):
    """The same batches and views, trained on by `ProPosByHand`."""

    def __init__(self, setup: TrainingSetup, device: torch.device, batches: int) -> None:
        super().__init__(setup, device, batches)
        self.propos = ProPosByHand(self.method, steps_per_epoch=self.method.steps_per_epoch)  # type: ignore[arg-type]

    def run_epoch(self) -> float:
        """Run the E-step, train one epoch and return the seconds of its steps, without the E-step."""
        epoch, method = self.trainer.current_epoch, self.method
        clean_batches = list(self.datamodule.clean_batches(self.datamodule.fit, self.device))
        with self.forward_context():
            features = self.propos.features([images.to(method.weight_dtype) for images in clean_batches])
            features = features.float() if features.dtype == torch.bfloat16 else features
        method.e_step(features, (self.datamodule.seed, "e_step", epoch))
        pseudo_labels = method.pseudo_labels.assignments  # type: ignore[attr-defined]
        is_warmed_up = epoch >= method.warmup_epochs  # type: ignore[attr-defined, operator]
        indices = self.datamodule.draw_epoch_batches(epoch, None)[: self.batches]
        synchronize(self.device)
        start = time.perf_counter()
        for raw_batch in prefetch(
            lambda i=i, n=n: self.datamodule.read_batch(i, epoch, n) for n, i in enumerate(indices)
        ):
            draws, global_batch_size = raw_batch.draws, raw_batch.draws.global_batch_size
            rows = slice(0, len(raw_batch.images))
            images = raw_batch.images.to(self.device, non_blocking=True)
            views = self.datamodule.views(
                images, draws.make_generator("views"), rows=rows, global_batch_size=global_batch_size
            )
            a, b = (view.to(method.weight_dtype) for view in views)
            batch_indices = raw_batch.indices.to(self.device, non_blocking=True)
            with self.forward_context():
                noise = None
                if is_warmed_up and method.noise_std:  # type: ignore[attr-defined]
                    like = a.new_empty(len(a), method.pseudo_labels.centroids.shape[1])  # type: ignore[attr-defined]
                    noise = tuple(method.noise_std * draws.normal_like(like, f"noise of {v}") for v in "ab")  # type: ignore
                self.propos.step(a, b, pseudo_labels[batch_indices], noise, use_scattering=is_warmed_up)
        synchronize(self.device)
        self.trainer.current_epoch += 1
        return time.perf_counter() - start

    def max_weight_difference(self, trained: ClusteringMethod) -> float:
        """Return the largest difference of a backbone weight from `trained`, divided by the largest weight."""
        pairs = zip(self.propos.online[0].parameters(), trained.backbone.parameters(), strict=True)  # type: ignore
        differences, sizes = zip(
            *((float((a - b).detach().abs().max()), float(b.detach().abs().max())) for a, b in pairs), strict=True
        )
        return max(differences) / max(sizes)


class InterleavedEpochs(Callback):
    """After each epoch of the framework, run one epoch of every other loop, and time all of them."""

    def __init__(self, other_loops: dict[str, BareLoop], batches: int) -> None:
        self.other_loops = other_loops
        self.batches = batches
        self.seconds_per_step: dict[str, list[float]] = defaultdict(list)  # by loop, one value for each timed epoch
        self.e_step_seconds: list[float] = []
        self.epoch_start, self.previous_e_step_seconds = 0.0, 0.0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        synchronize(pl_module.device)
        epoch_seconds = time.perf_counter() - self.epoch_start
        e_step_seconds = pl_module.e_step_seconds - self.previous_e_step_seconds
        is_timed = trainer.current_epoch >= UNTIMED_EPOCHS
        if is_timed:
            self.seconds_per_step["framework"].append((epoch_seconds - e_step_seconds) / self.batches)
            self.e_step_seconds.append(e_step_seconds)
        for name, loop in self.other_loops.items():
            seconds = loop.run_epoch() / self.batches
            if is_timed:
                self.seconds_per_step[name].append(seconds)
        self.previous_e_step_seconds = pl_module.e_step_seconds
        self.epoch_start = time.perf_counter()

    def median_seconds_per_step(self) -> dict[str, float]:
        return {name: statistics.median(seconds) for name, seconds in self.seconds_per_step.items()}
