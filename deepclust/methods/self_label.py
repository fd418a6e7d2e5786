"""Self-labelling: the third stage of SCAN (Van Gansbeke et al.; ECCV 2020, arXiv 2005.12320), for any clustering.

A trained clustering is right most often where it is sure. So it becomes its own teacher: of the images whose cluster
it is sure of on a clean view, it learns that cluster on a strongly changed view. Classes are weighted by how rarely
they are kept, so that none takes over. SeCu and GCC end with this stage too. It starts from a run of any method whose
own rule can be trained, and goes on with everything that this rule uses.

Differs from the authors' code in:
- a batch in which no image is sure enough has the loss 0, and an epoch without any ends the run; theirs stops at once.
- `ema_mode: shadow` keeps an average of the weights for the clusters and leaves the trained ones alone. Theirs,
  `replace`, writes the average over the trained weights after each step, so that a step counts (1 - decay)-fold, and
  holds the running statistics at their first values.
- several processes: kept images and class weights are those of the global batch.

Logged: `train/self_label`, the weighted cross-entropy; `train/kept`, the share of a batch that is sure enough.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.engine import distributed
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.ema import target_of, update_target
from deepclust.nn.schedules import Schedule


class SelfLabel(ClusteringMethod):
    """Trains `model`, a clustering method with a rule of its own, on what it is sure of.

    `image_size` (pixels) and `channels` are the images'. `ema_decay` counts where `ema_mode` is not none.
    """

    kept: Tensor

    def __init__(
        self,
        *,
        model: ClusteringMethod | None,
        num_clusters: int,
        image_size: int,
        channels: int,
        threshold: float,
        balanced: bool,
        ema_mode: Literal["shadow", "replace", "none"],
        ema_decay: float,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
    ) -> None:
        if model is None:
            raise InputError(
                "self-labelling goes on from a trained clustering, and start and before are null",
                expected="a finished run of a method with clusters of its own, such as scan or secu",
                do="set start=DIR",
            )
        if model.num_clusters != num_clusters:
            raise InputError(
                f"dataset.num_clusters is {num_clusters} and the earlier run has {model.num_clusters} clusters",
                expected="the same number",
                do=f"set dataset.num_clusters={model.num_clusters}",
            )
        # The whole model stands in the backbone's place, so that its weights are saved once.
        super().__init__(
            backbone=model,
            num_clusters=num_clusters,
            optimizer=optimizer,
            schedule=schedule,
            e_step_every_n_epochs=0,
        )
        self.image_shape = (channels, image_size, image_size)
        self.threshold = threshold
        self.balanced = balanced
        self.ema_mode = ema_mode
        self.ema_decay = ema_decay
        self.shadow = None if ema_mode == "none" else target_of(model)
        self.choose_trained()
        if ema_mode == "replace":
            for norm in norms(model):
                norm.momentum = 0.0
        self.register_buffer("kept", torch.zeros((), dtype=torch.int64))  # images kept in this epoch so far
        self.kept_share = torch.zeros(())
        self.train()

    @property
    def model(self) -> ClusteringMethod:
        """The clustering in training."""
        return self.backbone  # type: ignore[return-value]

    def train(self, mode: bool = True) -> "SelfLabel":
        """The model wholly in this mode, also what it holds in evaluation mode by itself; its average never trains."""
        super().train(mode)
        for module in self.model.modules():
            module.training = mode
        if self.shadow is not None:
            self.shadow.eval()
        return self

    # What is trained

    def choose_trained(self) -> None:
        """Let those weights take a gradient on which the model's clusters hang, and no others.

        Raises:
            InputError: where there are none.
        """
        weights = list(self.model.parameters())
        for weight in weights:
            weight.requires_grad_(True)
        training = self.training
        self.model.eval()  # so that this leaves no trace in running statistics
        with torch.enable_grad():
            image = torch.zeros(1, *self.image_shape, dtype=self.weight_dtype, device=self.device)
            logits = self.model.cluster_logits(self.model.encode(image))
            gradients: tuple[Tensor | None, ...] = ()
            if logits is not None and logits.requires_grad:
                gradients = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
        self.train(training)
        if not any(gradient is not None for gradient in gradients):
            raise InputError(
                f"the earlier run is of {type(self.model).__name__}, whose clusters hang on no trained weights",
                expected="a method that learns a rule of its own, such as scan, cc or secu",
                do="set start=DIR to a run of one",
            )
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.requires_grad_(gradient is not None)

    def start_from(self, earlier: ClusteringMethod) -> None:
        for own in (self.model, self.shadow):
            if own is not None:
                self.take_over(own, earlier)
        self.choose_trained()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_state_dict(*args, **kwargs)
        self.choose_trained()  # the state may say which of several heads is used
        return loaded

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        if batch.extra:
            raise InputError(
                "the data set has extra images, which belong to no cluster",
                expected="every image among those to be clustered",
                do="set dataset.source.extra=[]",
            )
        weak, strong = batch.views
        with torch.no_grad():  # in training mode all the same, so that it moves the running statistics
            weak_logits = distributed.gather(self.logits(weak))
        strong_logits = distributed.gather_with_gradient(self.logits(strong))
        loss, self.kept_share = self_label_loss(
            weak_logits, strong_logits, threshold=self.threshold, balanced=self.balanced
        )
        self.kept += (self.kept_share * len(weak_logits)).round().long()
        return {"self_label": loss}

    def logits(self, images: Tensor) -> Tensor:
        """Cluster logits (N, K) by the model in training."""
        logits = self.model.cluster_logits(self.model.encode(images))
        assert logits is not None
        return logits

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.average()

    @torch.no_grad()
    def average(self) -> None:
        """Follow a step of the optimiser with the average of the weights."""
        if self.shadow is None:
            return
        update_target(self.shadow, self.model, self.ema_decay)
        if self.ema_mode == "replace":
            torch._foreach_copy_(list(self.model.parameters()), list(self.shadow.parameters()))
        for ours, theirs in zip(norms(self.shadow), norms(self.model), strict=True):
            for name, value in theirs.named_buffers():
                ours.get_buffer(name).copy_(value)

    # Epochs

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.kept.zero_()

    def on_train_epoch_end(self) -> None:
        if not self.kept:
            raise InputError(
                f"in a whole epoch the clustering was not sure of a single image (above {self.threshold})",
                expected="an earlier run that is sure of some images",
                do="train the earlier stage longer, or lower method.threshold",
            )

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/kept", self.kept_share)

    # The clusters

    @property
    def judged(self) -> ClusteringMethod:
        """The model, or its average."""
        return self.model if self.shadow is None else self.shadow  # type: ignore[return-value]

    def encode(self, images: Tensor) -> Tensor:
        return self.judged.encode(images)

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        return self.judged.cluster_logits(features)


def norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The layers that keep running statistics."""
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


@full_precision
def self_label_loss(
    weak_logits: Tensor, strong_logits: Tensor, *, threshold: float, balanced: bool
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the strong view against what the weak view is sure of, and the share kept; two scalars.

    sum_i w_i CE(strong_i, y_i) / sum_i w_i over the kept rows of logits (N, K), with y_i the cluster by the weak view
    and w_i the weight of that cluster, 1 unless `balanced`; 0 where none is kept. SCAN, section 2.3 and its code.
    """
    pseudo_labels, keep = confident(weak_logits.detach(), threshold=threshold)
    weights = keep.to(strong_logits.dtype)
    if balanced:
        weights = weights * class_weights(pseudo_labels, keep, like=strong_logits)[pseudo_labels]
    losses = F.cross_entropy(strong_logits, pseudo_labels, reduction="none")
    # A kept row weighs 1 at least, so the lower bound only spares the empty sum.
    return (weights * losses).sum() / weights.sum().clamp(min=1), keep.float().mean()


def confident(logits: Tensor, *, threshold: float) -> tuple[Tensor, Tensor]:
    """The likeliest cluster (N,) by logits (N, K), and whether its probability is above the threshold (N,)."""
    probability, pseudo_labels = logits.softmax(1).max(1)
    return pseudo_labels, probability > threshold


def class_weights(pseudo_labels: Tensor, keep: Tensor, *, like: Tensor) -> Tensor:
    """Kept rows over those of the cluster (K,), in the dtype and for the K of logits `like`; 1 where it has none."""
    counts = like.new_zeros(like.shape[1]).index_add_(0, pseudo_labels, keep.to(like.dtype))
    return torch.where(counts > 0, counts.sum() / counts.clamp(min=1), 1.0)
