"""Self-labelling: the third stage of SCAN (Van Gansbeke et al.; ECCV 2020, arXiv 2005.12320), for any clustering.

A trained clustering is most often right where it is confident. It therefore becomes its own teacher. If it is confident
about an image on a clean (weak) view, the cluster is kept as the pseudo-label of the image, and the network learns it
on a strongly augmented view. Clusters are weighted inversely to the number of kept images, so that none takes over.
SeCu and GCC end with this stage too. It starts from a run of any method whose own clustering can be trained, and trains
all weights that this clustering depends on.

Differs from the authors' code in:
- Confidence. A batch without a confident image has the loss 0, and an epoch without one ends the run. The authors' code
  stops at the first such batch.
- Averaged weights. `ema_mode: shadow` uses an average of the weights for the final clustering and leaves the trained
  weights as they are. The authors' code is `replace`: it overwrites the trained weights with the average after every
  step, so that a step only counts (1 - decay)-fold, and keeps the running statistics at their initial values.
- Cutout on small digits. Its sides can be odd (theirs are even, as they are here on the images that they use).

Logged:
- `train/self_label`: the weighted cross-entropy.
- `train/kept`: the share of the images of a batch that are kept.
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
from deepclust.methods.base import ClusteringMethod, require_earlier_model
from deepclust.nn.ema import make_target, update_target
from deepclust.nn.schedules import Schedule
from deepclust.number_types import Fraction, FractionBelowOne, PositiveInt


class SelfLabel(ClusteringMethod):
    """Trains a clustering method on the images of whose clusters it is confident.

    The arguments not listed here are those of `ClusteringMethod`.

    Args of the network:
        model: the method of the earlier run, whose own clustering is trained; it takes the place of `backbone`.
        image_size: height and width of the images, in pixels.
        channels: number of channels of the images.

    Args of the objective (section 2.3):
        threshold: an image is kept if the probability of its cluster exceeds this value.
        balanced: whether clusters are weighted inversely to the number of their kept images.

    Args of the averaged weights:
        ema_mode: "shadow", "replace" (see the module) or "none", which keeps no average.
        ema_decay: decay of the average. It has no effect if `ema_mode` is "none".
    """

    num_views = 2

    kept: Tensor

    def __init__(
        self,
        *,
        model: ClusteringMethod | None,
        num_clusters: PositiveInt,
        image_size: PositiveInt,
        channels: PositiveInt,
        threshold: FractionBelowOne,
        balanced: bool,
        ema_mode: Literal["shadow", "replace", "none"],
        ema_decay: Fraction,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
    ) -> None:
        model = require_earlier_model(model, num_clusters, use="self-labelling starts from", such_as="scan or secu")
        # The whole model takes the place of the backbone, so that its weights are saved once.
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
        self.shadow = None if ema_mode == "none" else make_target(model)
        self.select_trained_weights()
        if ema_mode == "replace":
            for norm in batch_norm_layers(model):
                norm.momentum = 0.0
        self.register_buffer("kept", torch.zeros((), dtype=torch.int64))  # number of images kept so far in this epoch
        self.kept_share = torch.zeros(())
        self.train()

    @property
    def model(self) -> ClusteringMethod:
        """The method that is trained."""
        return self.backbone  # type: ignore[return-value]

    def train(self, mode: bool = True) -> "SelfLabel":
        """Set the mode of the whole model, including the parts that it keeps in evaluation mode; not of the average."""
        super().train(mode)
        for module in self.model.modules():
            module.training = mode
        if self.shadow is not None:
            self.shadow.eval()
        return self

    # The trained weights

    def select_trained_weights(self) -> None:
        """Let exactly those weights require a gradient that the clustering of the model depends on.

        Raises:
            InputError: if there are none.
        """
        weights = list(self.model.parameters())
        for weight in weights:
            weight.requires_grad_(True)
        was_training = self.training
        self.model.eval()  # so that the running statistics do not change
        with torch.enable_grad():
            image = torch.zeros(1, *self.image_shape, dtype=self.weight_dtype, device=self.device)
            logits = self.model.cluster_logits(self.model.encode(image))
            gradients: tuple[Tensor | None, ...] = ()
            if logits is not None and logits.requires_grad:
                gradients = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
        self.train(was_training)
        if not any(gradient is not None for gradient in gradients):
            raise InputError(
                f"the earlier run is of {type(self.model).__name__}, whose clusters depend on no trained weights",
                expected="a method that trains its own clustering, such as scan, cc or secu",
                do="set start=DIR to a run of such a method",
            )
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.requires_grad_(gradient is not None)

    def start_from(self, earlier: ClusteringMethod) -> None:
        for network in (self.model, self.shadow):
            if network is not None:
                self.load_weights(network, earlier)
        self.select_trained_weights()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_state_dict(*args, **kwargs)
        self.select_trained_weights()  # the loaded state can select another one of several heads
        return loaded

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        batch.refuse_extra_images("which belong to no cluster")
        weak, strong = batch.views
        with torch.no_grad():  # in training mode, as in the authors' code, so it updates the running statistics
            weak_logits = distributed.all_gather(self.compute_logits(weak))
        strong_logits = distributed.all_gather_with_gradient(self.compute_logits(strong))
        loss, self.kept_share = self_label_loss(
            weak_logits, strong_logits, threshold=self.threshold, balanced=self.balanced
        )
        self.kept += (self.kept_share * len(weak_logits)).round().long()
        return {"self_label": loss}

    def compute_logits(self, images: Tensor) -> Tensor:
        """Return the cluster logits (N, K) of the trained model for images (N, channels, H, W)."""
        logits = self.model.cluster_logits(self.model.encode(images))
        assert logits is not None
        return logits

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.update_average()

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the averaged weights after an optimiser step; in the mode "replace", copy them into the model too.

        Running statistics are not averaged but copied from the model.
        """
        if self.shadow is None:
            return
        update_target(self.shadow, self.model, self.ema_decay)
        if self.ema_mode == "replace":
            torch._foreach_copy_(list(self.model.parameters()), list(self.shadow.parameters()))
        for averaged, trained in zip(batch_norm_layers(self.shadow), batch_norm_layers(self.model), strict=True):
            for name, value in trained.named_buffers():
                averaged.get_buffer(name).copy_(value)

    # Epochs

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.kept.zero_()

    def on_train_epoch_end(self) -> None:
        if not self.kept:
            raise InputError(
                f"in a whole epoch no image has a cluster with a probability above {self.threshold}",
                expected="an earlier run that is confident about some images",
                do="train the earlier stage longer, or lower method.threshold",
            )

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/kept", self.kept_share)

    # The final clustering

    @property
    def evaluated_model(self) -> ClusteringMethod:
        """The model with the averaged weights, or the trained model if no average is kept."""
        return self.model if self.shadow is None else self.shadow  # type: ignore[return-value]

    def encode(self, images: Tensor) -> Tensor:
        return self.evaluated_model.encode(images)

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        return self.evaluated_model.cluster_logits(features)


def batch_norm_layers(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the layers of `module` that keep running statistics."""
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


@full_precision
def self_label_loss(
    weak_logits: Tensor, strong_logits: Tensor, *, threshold: float, balanced: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss of the strong view on the confident pseudo-labels of the weak view, and the share kept; scalars.

    sum_i w_i CE(strong_i, y_i) / sum_i w_i over the kept rows of logits (N, K), where y_i is the cluster on the weak
    view and w_i the weight of that cluster, which is 1 unless `balanced`. It is 0 if no row is kept. (SCAN, section 2.3
    and the authors' code.)
    """
    pseudo_labels, is_kept = confident_pseudo_labels(weak_logits.detach(), threshold=threshold)
    weights = is_kept.to(strong_logits.dtype)
    if balanced:
        weights = weights * class_weights(pseudo_labels, is_kept, like=strong_logits)[pseudo_labels]
    losses = F.cross_entropy(strong_logits, pseudo_labels, reduction="none")
    # The weight of a kept row is at least 1, so the clamp only matters if no row is kept.
    return (weights * losses).sum() / weights.sum().clamp(min=1), is_kept.float().mean()


def confident_pseudo_labels(logits: Tensor, *, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the most probable clusters (N,) of logits (N, K), and whether their probability exceeds the threshold."""
    probability, pseudo_labels = logits.softmax(1).max(1)
    return pseudo_labels, probability > threshold


def class_weights(pseudo_labels: Tensor, is_kept: Tensor, *, like: Tensor) -> Tensor:
    """Return the weight (K,) of each cluster: the number of kept rows over that of the cluster; 1 for empty clusters.

    K and the dtype are those of the logits `like` (N, K).
    """
    counts = like.new_zeros(like.shape[1]).index_add_(0, pseudo_labels, is_kept.to(like.dtype))
    return torch.where(counts > 0, counts.sum() / counts.clamp(min=1), 1.0)
