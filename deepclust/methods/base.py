"""The base class of all clustering methods: the hooks that a method overrides and the training that all methods share.

Every paper is one file with one subclass of `ClusteringMethod`. Where to look in this file:

- what a method may override: the section "Hooks of a method".
- what is logged in a step: `log_terms`.
- features of all images, gathered over all processes for the E-step: `run_e_step` and `encode_all`.
- optimiser, parameter groups and learning rates: `configure_optimizers`.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from deepclust.batch import Draws, TrainBatch, split_to_cache_size
from deepclust.clustering.cluster_tree import ClusterTree
from deepclust.engine import distributed
from deepclust.engine.batch_norm import RowGroups
from deepclust.engine.cuda_graphs import ReplayedFunction, ReplayedParts
from deepclust.engine.epoch_length import count_steps_per_epoch
from deepclust.engine.progress_bar import track
from deepclust.errors import InputError
from deepclust.nn.schedules import Schedule
from deepclust.number_types import NonNegativeInt, PositiveInt

LEARN_SLOWER = (
    "lower the learning rate (method.optimizer.lr) or correct another number of the method, and train in a new folder "
    "(hydra.run.dir=DIR)"
)


class ClusteringMethod(LightningModule):
    """Base class of a clustering method: sums the loss terms, runs the E-step, encodes data sets, makes the optimiser.

    A method implements `losses` and overrides the other hooks that it needs. It may use any Lightning hook, and calls
    `super()` where this class defines the hook too.

    State per image is a buffer of `num_images` rows. It is allocated in the constructor, so that checkpoints hold it,
    indexed by `batch.indices`, and written with values that were gathered from all processes.

    Args:
        backbone: the network to train, from images to features (N, D); its attribute `num_features` is D.
        num_clusters: the number of clusters K; a method with `finds_num_clusters` sets it when it finds another.
        optimizer: makes the optimiser when it is called with the groups of `parameter_groups`.
        schedule: the factor of the learning rate at each optimiser step; a group may have its own.
        e_step_every_n_epochs: the E-step runs before the first epoch and then every so many epochs; 0 means never.
    """

    num_views: ClassVar[int | None] = None  # how many views of an image `losses` takes; None: any number
    finds_num_clusters: ClassVar[bool] = False  # whether `num_clusters` may be "auto": the E-step finds it
    is_transductive: ClassVar[bool] = False  # whether it clusters the images of the fit set only, and no new ones
    shuffle: bool = True  # whether an epoch takes the images in random order; otherwise in that of the data set
    first_bad_step: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: PositiveInt,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
        e_step_every_n_epochs: NonNegativeInt,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_clusters = num_clusters
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.e_step_every_n_epochs = e_step_every_n_epochs
        self.e_step_seconds = 0.0
        self.has_earlier_run = False  # whether this process has loaded what an earlier stage has learned
        # CUDA graphs of the methods marked `@replayable`; None: they run as written.
        self.replayed_parts: ReplayedParts | None = None
        # Which images share batch statistics, if not all images that a process holds do.
        self.batch_norm_groups: RowGroups | None = None
        # Whether the optimiser steps after the current batch. It does not while gradients are still accumulated.
        self.is_optimizer_step = True
        # For each batch since the last optimiser step that said so, the parameters that it does not train.
        self.untrained_parameters: list[set[nn.Parameter]] = []
        # The first step (from 1) whose loss was not finite; 0 for none. A buffer, because a comparison on the host
        # would make every step wait for the device.
        self.register_buffer("first_bad_step", torch.zeros((), dtype=torch.int64), persistent=False)

    # Hooks of a method ------------------------------------------------------------------------------------------------

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Return the weighted terms of the objective by name, each a scalar; their sum is minimised."""
        raise NotImplementedError(f"{type(self).__name__} does not implement losses(batch); every method has to")

    def encode(self, images: Tensor) -> Tensor:
        """Return the features (N, D) that are clustered, of clean images (N, channels, H, W)."""
        return self.backbone(images)

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        """Return logits (N, K) of the method's own clustering from the features of `encode`; None: it has no rule.

        The cluster of an image is the one with the largest logit.
        """
        return None

    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """Update the state that is inferred from the features (M, D) of the whole fit set, such as pseudo-labels.

        `run_e_step` calls it. Every process is given the features of all images and must end in the same state;
        random draws depend on `key` only.
        """

    def e_step_assignments(self) -> Tensor | None:
        """Return the clusters (M,) that the last E-step has given the images of the fit set; None: it gives them none.

        The share that has changed since the E-step before is logged as `e_step/changed`.
        """
        return None

    def cluster_tree(self) -> ClusterTree | None:
        """Return the tree of the images of the fit set that the E-step has found; None: it finds none."""
        return None

    def sample_images(self, key: tuple[int | str, ...]) -> Tensor | None:
        """Return S generated images of each cluster, (K, S, channels, H, W) in [0, 1]; None: it generates none.

        The report and dashboards show them, a row for each cluster. Random draws depend on `key` only.
        """
        return None

    def sampling_weights(self) -> Tensor | None:
        """Return weights (M,) by which the next epoch draws images of the fit set, with replacement.

        None: every image is drawn once, in random order.
        """
        return None

    def uses_extra_images(self, epoch: int) -> bool:
        """Return whether the images that only help the representation, if there are any, take part in this epoch."""
        return True

    def companions(self, indices: Tensor, draws: Draws) -> Tensor | None:
        """Return the images (N, P) of the fit set to load with each image (N,) of a global batch; None: no others.

        Both are CPU tensors. Batches are read ahead of their use. The answer may therefore depend only on
        `draws.make_generator("companions")` and on state that changes between epochs.
        """
        return None

    def start_from(self, earlier: "ClusteringMethod") -> None:
        """Load what the run of an earlier stage has learned; called before the first step of a new run.

        Raises:
            InputError: where the networks of the two runs differ.
        """
        self.load_weights(self.backbone, earlier.backbone)
        self.has_earlier_run = True

    def require_earlier_run(self, use: str, *, stage: str) -> None:
        """Refuse to start a training on networks as they were built, without what an earlier stage has learned.

        Args:
            use: what the method does with it, such as "DEC clusters the embeddings".
            stage: the method that usually makes the earlier run.

        Raises:
            InputError: if there is no earlier run.
        """
        if not self.has_earlier_run:
            raise InputError(
                f"{use} of an earlier run, and start and before are null",
                expected=f"a finished run of method={stage} or of another method with the same backbone",
                do="set start=DIR",
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's groups; beside torch's keys a group may have its own `schedule` and an `lr_factor`."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    # A training step and its logged values ----------------------------------------------------------------------------

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        num_batches, num_accumulated = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        self.is_optimizer_step = (batch_idx + 1) % num_accumulated == 0 or batch_idx + 1 == num_batches
        batch.draws.seed_layers(self.device, distributed.rank())
        if self.batch_norm_groups is not None:
            first_image, size = batch.draws.first_row, batch.draws.global_batch_size
            self.batch_norm_groups.set_batch(len(batch.indices), first_image, size)
        try:
            terms = self.losses(batch)
        except (RuntimeError, ValueError) as error:
            if bad := self.list_nonfinite_weights():  # functions of torch refuse NaN with words of their own
                raise self.explain_nonfinite_weights(bad) from error
            raise
        loss = torch.stack(list(terms.values())).sum()
        step = self.global_step + 1
        is_first_bad = ~torch.isfinite(loss.detach()) & (self.first_bad_step == 0)
        self.first_bad_step += is_first_bad * step
        is_logged = step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if is_logged or self.device.type == "cpu":
            self.check_losses_are_finite()
        if is_logged:
            self.log_terms(terms, loss)
        return loss

    def log_terms(self, terms: dict[str, Tensor], loss: Tensor) -> None:
        """Log every term as `train/<name>` and their sum as `train/loss`, every `trainer.log_every_n_steps` steps.

        Other values are logged with `self.log` in the Lightning hook where they are known; for example the norm of the
        gradients in `on_before_optimizer_step`.
        """
        names = [*terms, "loss"]
        # What is minimised: DDP averages the gradients of the processes, whose terms may be those of their own images.
        values = distributed.mean_over_processes(torch.stack([*terms.values(), loss]).detach())
        self.log_dict({f"train/{name}": value for name, value in zip(names[:-1], values[:-1], strict=True)})
        self.log("train/loss", values[-1], prog_bar=True)

    def check_losses_are_finite(self) -> None:
        """Raise InputError, on every process, if the loss of any process was not finite; called before every save."""
        first_bad_steps = distributed.all_gather(self.first_bad_step.unsqueeze(0))
        if bad_steps := [int(step) for step in first_bad_steps if step > 0]:
            raise InputError(
                f"the loss of step {min(bad_steps)} is not a finite number",
                expected="finite losses",
                do=LEARN_SLOWER,
            )

    def check_weights_are_finite(self) -> None:
        """Raise InputError, on every process, if the weights of any process are not finite.

        Called before every save, at the end of training, and where a checkpoint is read. It waits for the device.
        """
        bad = self.list_nonfinite_weights()
        if bool(distributed.all_gather(torch.tensor([bool(bad)], device=self.device)).any()):
            raise self.explain_nonfinite_weights(bad)

    def list_nonfinite_weights(self) -> list[str]:
        """Return the names of the parameters that are not finite and of the buffers that hold NaN.

        Buffers may hold infinities, as a mask of attention does.
        """
        bad_parameters = [name for name, p in self.named_parameters() if not bool(p.isfinite().all())]
        return bad_parameters + [name for name, buffer in self.named_buffers() if bool(buffer.isnan().any())]

    def explain_nonfinite_weights(self, names: list[str]) -> InputError:
        """Return the error that says so, and at which step it was found."""
        step = "" if self._trainer is None else f" after step {self.global_step}"
        listed = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
        return InputError(f"weights{step} are not finite numbers{listed}", expected="finite weights", do=LEARN_SLOWER)

    def leave_untrained(self, parameters: Iterable[nn.Parameter]) -> None:
        """Say that the current batch does not train these parameters, or none; called once in each `losses`.

        Parameters that no batch of an optimiser step trains stay as they are. With a gradient of 0, which DDP needs,
        momentum and weight decay would still move them, so their gradients become None before the step.
        """
        self.untrained_parameters.append(set(parameters))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.untrained_parameters:
            for p in set.intersection(*self.untrained_parameters):
                p.grad = None
        self.untrained_parameters = []

    # The E-step, and the features of all images gathered for it -------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        every = self.e_step_every_n_epochs
        if every and self.current_epoch % every == 0:
            self.run_e_step(self.current_epoch)

    def run_e_step(self, epoch: int) -> None:
        """Encode the fit set with the current weights, gather its features over all processes and call `e_step`.

        `epoch` (from 0) is the epoch that follows the E-step; it makes the random draws of this E-step its own.
        """
        started = time.perf_counter()
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        with self.trainer.precision_plugin.forward_context():
            features = self.encode_all(datamodule.clean_batches(datamodule.fit, self.device), len(datamodule.fit))
        self.e_step(features, (datamodule.seed, "e_step", epoch))
        self.e_step_seconds += time.perf_counter() - started

    @torch.no_grad()
    def encode_all(
        self, batches: Iterable[Tensor], num_images: int, encode: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return the features (M, D) of all images in data-set order, at least float32, the same on every process.

        `encode` is another network of the method that takes the place of its own `encode`.

        Each process encodes `batches`, its own clean images, and the results are gathered. The images of a process are
        a contiguous part of the data set, in order, and the parts follow each other by rank. All processes use the
        buffers of rank 0, such as the running statistics of batch normalisation, so that one network encodes all.

        Raises:
            InputError: if features are not finite; it says whether the weights are.
        """
        distributed.broadcast_buffers(self)
        was_training, encoded, encode = self.training, [], encode or self.encode
        self.eval()
        try:
            num_own_images = num_images // distributed.world_size()
            for images in track(batches, "features of all images", num_own_images, size=len):
                encoded += [encode(part) for part in split_to_cache_size(images.to(self.device, self.weight_dtype))]
        finally:
            self.train(was_training)
        encoded = [f.float() if f.dtype in (torch.float16, torch.bfloat16) else f for f in encoded]
        features = distributed.all_gather(torch.cat(encoded))
        assert len(features) == num_images, f"{len(features)} features of {num_images} images"
        if num_bad := int((~features.isfinite().all(1)).sum()):
            if bad := self.list_nonfinite_weights():
                raise self.explain_nonfinite_weights(bad)
            raise InputError(
                f"the features of {num_bad} of {num_images} images are not finite numbers",
                expected="finite features",
                do=f"look at these images and at {type(self).__name__}.encode; if it was just trained, {LEARN_SLOWER}",
            )
        return features

    # Networks: loading, compilation, CUDA graphs ----------------------------------------------------------------------

    @staticmethod
    def load_weights(network: nn.Module, earlier: nn.Module) -> None:
        """Copy the parameters and buffers of `earlier` into `network`.

        Raises:
            InputError: where the two networks differ.
        """
        try:
            network.load_state_dict(earlier.state_dict())
        except RuntimeError as error:
            raise InputError(
                "the network of the earlier run has other weights than the one of this run",
                expected="the same network in both",
                do="choose the backbone, and the sizes in method, as in the earlier run",
            ) from error

    def compile_networks(self, mode: str) -> None:
        """Compile the backbone, and the copies of it that a method holds, in place; the names of weights stay.

        `mode` is that of torch.compile. Every batch size is compiled for itself, since there are few.
        """
        # Each network, mode and batch size is one compilation; beyond torch's limit of 8 the rest would run uncompiled.
        torch._dynamo.config.recompile_limit = 64
        for module in self.modules():
            if type(module) is type(self.backbone):
                module.compile(mode=mode, dynamic=False)

    def use_cuda_graphs(self) -> None:
        """Replay the method's networks, compiled or not, and its `@replayable` parts as CUDA graphs on a GPU.

        Networks are the direct children of the method. Those that lie deeper, as in a list of heads, are replayed
        within the `@replayable` part that calls them. The names of weights stay.
        """
        self.replayed_parts = ReplayedParts()
        for network in self.children():
            if any(True for _ in network.parameters()):
                call = network._compiled_call_impl or network._call_impl
                network._compiled_call_impl = ReplayedFunction(call, network)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The floating-point type of the weights, or of buffers if there are none, which inputs must have."""
        return next(t.dtype for t in chain(self.parameters(), self.buffers()) if t.is_floating_point())

    # The optimiser ----------------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> float:
        """The number of optimiser steps in a pass of the data; a step that two passes share counts in parts."""
        return count_steps_per_epoch(self.trainer, self.trainer.datamodule.batches_per_epoch)  # type: ignore[attr-defined]

    def locate_step(self, step: int) -> tuple[float, float]:
        """Return what schedules are given for an optimiser step (from 1): a step and the number of steps per epoch."""
        return step, self.steps_per_epoch

    def configure_optimizers(self) -> Any:
        groups = self.parameter_groups()
        schedules = [group.pop("schedule", self.schedule) for group in groups]
        group_factors = [group.pop("lr_factor", 1.0) for group in groups]
        optimizer = self.make_optimizer(groups)
        for group, factor in zip(optimizer.param_groups, group_factors, strict=True):
            group["lr"] *= factor
        # LambdaLR counts from 0 and sets the rate before the step that uses it; schedules count steps from 1.
        factors: list[Callable[[int], float]] = [partial(self._learning_rate_factor, s) for s in schedules]
        scheduler = {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _learning_rate_factor(self, schedule: Schedule, steps_done: int) -> float:
        return schedule(*self.locate_step(steps_done + 1))


def require_earlier_model(
    model: ClusteringMethod | None, num_clusters: int, *, use: str, such_as: str
) -> ClusteringMethod:
    """Return the model of an earlier run, for a method that trains it further and keeps its clusters.

    Args:
        model: that of the earlier run; None if there is none.
        num_clusters: the number of clusters K of this run.
        use: what the method does with it, such as "self-labelling starts from".
        such_as: methods that usually make the earlier run.

    Raises:
        InputError: if there is no earlier run, or it has another number of clusters.
    """
    if model is None:
        raise InputError(
            f"{use} a trained clustering, and start and before are null",
            expected=f"a finished run of a method with its own clustering, such as {such_as}",
            do="set start=DIR",
        )
    if model.num_clusters != num_clusters:
        raise InputError(
            f"dataset.num_clusters is {num_clusters} and the earlier run has {model.num_clusters} clusters",
            expected="the same number",
            do=f"set dataset.num_clusters={model.num_clusters}",
        )
    return model
