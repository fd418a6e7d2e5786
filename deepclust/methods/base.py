"""The contract of a method. One paper, one file, one subclass."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from deepclust.batch import Draws, TrainBatch, cache_sized
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import Replayed, ReplayedParts
from deepclust.engine.progress import track
from deepclust.errors import InputError
from deepclust.nn.schedules import Schedule


class ClusteringMethod(LightningModule):
    """What every method shares: the sum of the loss terms, the E-step, the features of a whole data set, the optimiser.

    A method writes `losses` and whichever other hooks it needs. Any Lightning hook is free to use; call `super()`
    where this class has one. State per image is a buffer of `num_images` rows made in the constructor, so that a
    checkpoint holds it, indexed by `batch.indices` and written with values gathered from all processes.
    """

    first_bad_step: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: int,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
        e_step_every_n_epochs: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_clusters = num_clusters
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.e_step_every_n_epochs = e_step_every_n_epochs
        self.e_step_seconds = 0.0
        self.replayed_parts: ReplayedParts | None = None  # of a step, beside the networks
        self.steps_now = True  # whether the optimiser steps after this batch, or gradients still add up
        # The first step (from 1) whose loss was not finite, 0 for none; on the device, so that no step waits for it.
        self.register_buffer("first_bad_step", torch.zeros((), dtype=torch.int64), persistent=False)

    # What a method says -----------------------------------------------------------------------------------------------

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        """The weighted terms of the objective by name; their sum is minimised."""
        raise NotImplementedError(f"{type(self).__name__} must say what it minimises")

    def encode(self, images: Tensor) -> Tensor:
        """The features (N, D) that get clustered, of clean images (N, channels, H, W)."""
        return self.backbone(images)

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        """The method's own rule: (N, K), the larger the likelier, from `encode`d features; None: it has none."""
        return None

    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """Renew what is inferred over the whole fit set from its features (M, D).

        Every process is given all features and must end in the same state; `key` is what its random draws hang on.
        """

    def sampling_weights(self) -> Tensor | None:
        """How likely each image (M,) of the fit set is to be drawn in the coming epoch; None: each once, shuffled."""
        return None

    def companions(self, indices: Tensor, draws: Draws) -> Tensor | None:
        """The images (N, P) of the fit set that are wanted beside each image (N,) of a global batch; None: none.

        Both are CPU tensors. A batch is read ahead of its use, so the answer may hang only on the draws
        ("companions") and on what changes between epochs.
        """
        return None

    def start_from(self, earlier: "ClusteringMethod") -> None:
        """Take over what the run of an earlier stage has learned; called before the first step of a fresh run.

        Raises:
            InputError: where the two do not fit.
        """
        self.take_over(self.backbone, earlier.backbone)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups; beside torch's keys a group may have its own `schedule` and an `lr_factor`."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    @staticmethod
    def take_over(own: nn.Module, earlier: nn.Module) -> None:
        """The weights and running figures of `earlier` into `own`.

        Raises:
            InputError: where they are two kinds of network.
        """
        try:
            own.load_state_dict(earlier.state_dict())
        except RuntimeError as error:
            raise InputError(
                "the network of the earlier run has other weights than the one of this run",
                expected="the same network in both",
                do="choose the backbone, and the sizes in method, as in the earlier run",
            ) from error

    # What every method gets -------------------------------------------------------------------------------------------

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        batches, add_up = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        self.steps_now = (batch_idx + 1) % add_up == 0 or batch_idx + 1 == batches
        batch.draws.seed_layers(self.device, distributed.rank())
        terms = self.losses(batch)
        loss = torch.stack(list(terms.values())).sum()
        step = self.global_step + 1
        bad = ~torch.isfinite(loss.detach()) & (self.first_bad_step == 0)
        self.first_bad_step += bad * step
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every == 0 or self.device.type == "cpu":
            self.check_finite()
        if step % every == 0:
            self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})
            self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def check_finite(self) -> None:
        """Raise InputError if a loss was not a number; on every process if on one. Called before anything is saved."""
        steps = distributed.gather(self.first_bad_step.unsqueeze(0))
        if bad := [int(s) for s in steps if s > 0]:
            raise InputError(
                f"the loss of step {min(bad)} is not a finite number",
                expected="finite losses",
                do="lower the learning rate (method.optimizer.lr) or start again in this folder from the last good "
                "checkpoint",
            )

    def on_train_epoch_start(self) -> None:
        every = self.e_step_every_n_epochs
        if every and self.current_epoch % every == 0:
            self.run_e_step(self.current_epoch)

    def run_e_step(self, epoch: int) -> None:
        """The E-step on the present weights, as it stands before `epoch` (from 0)."""
        started = time.perf_counter()
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        with self.trainer.precision_plugin.forward_context():
            features = self.encode_all(datamodule.clean_batches(datamodule.fit, self.device), len(datamodule.fit))
        self.e_step(features, (datamodule.seed, "e_step", epoch))
        self.e_step_seconds += time.perf_counter() - started

    @torch.no_grad()
    def encode_all(self, batches: Iterable[Tensor], num_images: int) -> Tensor:
        """Features (M, D) of all images in order, at least float32, on every process.

        `batches` are this process's clean images: a contiguous share, in order, shares in rank order. Running figures
        are rank 0's on every process, for one network is meant.
        """
        distributed.broadcast_buffers(self)
        training, rows = self.training, []
        self.eval()
        try:
            share = num_images // distributed.world_size()
            for images in track(batches, "features of all images", share, size=len):
                rows += [self.encode(part) for part in cache_sized(images.to(self.device, self.weight_dtype))]
        finally:
            self.train(training)
        rows = [r.float() if r.dtype in (torch.float16, torch.bfloat16) else r for r in rows]
        features = distributed.gather(torch.cat(rows))
        assert len(features) == num_images, f"{len(features)} features of {num_images} images"
        return features

    def compile_networks(self, mode: str) -> None:
        """Have torch compile the backbone, and the copies of it that a method holds; names of weights stay.

        `mode` is torch.compile's. Sizes of batches are taken as fixed: there are few.
        """
        # A graph for each network, mode and size of batch; beyond torch's limit of 8 the rest would not be compiled.
        torch._dynamo.config.recompile_limit = 64
        for module in self.modules():
            if type(module) is type(self.backbone):
                module.compile(mode=mode, dynamic=False)

    def use_graphs(self) -> None:
        """Have the networks that the method calls, compiled or not, and its `replayable` parts replayed on a GPU.

        Networks are its children; those that lie deeper, as in a list of heads, belong to a part. Names of weights
        stay.
        """
        self.replayed_parts = ReplayedParts()
        for network in self.children():
            if any(True for _ in network.parameters()):
                network._compiled_call_impl = Replayed(network._compiled_call_impl or network._call_impl, network)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The floating type that inputs need."""
        return next(self.parameters()).dtype

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""
        batches = self.trainer.datamodule.batches_per_epoch  # type: ignore[attr-defined]
        return -(-batches // self.trainer.accumulate_grad_batches)

    def configure_optimizers(self) -> Any:
        groups = self.parameter_groups()
        schedules = [group.pop("schedule", self.schedule) for group in groups]
        rate_factors = [group.pop("lr_factor", 1.0) for group in groups]
        optimizer = self.make_optimizer(groups)
        for group, factor in zip(optimizer.param_groups, rate_factors, strict=True):
            group["lr"] *= factor
        # LambdaLR counts from 0 and sets the rate before the step that uses it; schedules count steps from 1.
        factors: list[Callable[[int], float]] = [partial(self._factor, s) for s in schedules]
        scheduler = {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _factor(self, schedule: Schedule, steps_done: int) -> float:
        return schedule(steps_done + 1, self.steps_per_epoch)
