"""Generative calibration, a reconstruction: a clustering that also learns from images which diffusion makes of it.

Xia, Huang, Ding ("Generative calibration clustering", arXiv 2404.09115). Only the abstract and digests of the paper
were at hand, and no code of the authors is known: its two stages, what its losses are for and its data sets are theirs,
and every formula, number and name of a term is this project's own. So the paper's figures cannot be expected of it.

Where images are few or uneven over the classes, generated ones shall help. The method goes on with a trained
clustering, such as CC's, which keeps its own loss on the real images. Rounds of three steps follow:

1. The clusters of all real images become pseudo-labels, and a diffusion model learns to make images of a given cluster.
2. It generates M images on average of each cluster that has any, equally many of each.
3. The clustering learns from batches of B real and B generated images, with features f and g, by

       L = L_base + a_c L_class_matching + a_s L_class_separation + a_m L_metric

   of which the second and the third compare the means of real and generated images in a kernel space, with D(j, l) the
   squared distance of the real images of cluster j and the generated ones of l (`deepclust.losses.kernel_means`):

       L_class_matching   = mean over j of D(j, j)
       L_class_separation = mean over j != l of max(0, margin - D(j, l))
       L_metric           = -sum_i r_i mean_{p: y_p = c_i} log softmax_p(cos(g_i, f_p) / tau) / sum_i r_i

   with r_i the probability that the clustering gives the condition c_i of generated image i, and y_p the pseudo-labels.

The diffusion model goes on from round to round. The cluster of an image is the arg max of the clustering.

What the abstract leaves open, and is chosen here, beside the formulas:
- Base loss. It is that of the earlier run on its own views; the other terms take the image without augmentation.
- One batch. Real and generated images go through the network together, so that batch normalisation treats them alike.
- Turns. An epoch trains the diffusion model or the clustering, and a round has epochs of the one, then of the other.
- Sampling. What is predicted of an image is clipped to its range at each step; else some images came out as noise.
- Empty clusters. They have no generated images.
- Without generated images. If all three weights are 0, none are made, for comparison: the run goes on with `L_base`.

Logged:
- `train/diffusion`: the mean squared error of the noise, in the epochs of the diffusion model. 1: it finds nothing.
- `train/class_matching`, `train/class_separation`, `train/reliable_metric`, beside the terms of the earlier run.
- `round/agreement`: the share of the generated images that the clustering puts into the cluster they were made of, as
  of when they were made.

The module has more lines than others, so that all of a round can be read in one place.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.losses.kernel_means import kernel_mean_distances, mean_where
from deepclust.methods.base import ClusteringMethod, require_earlier_model
from deepclust.nn.conditional_diffusion import ConditionalDiffusion
from deepclust.nn.optimizer_per_group import OptimizerPerGroup
from deepclust.nn.schedules import Schedule
from deepclust.number_types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

SAMPLES_PER_CLUSTER = 10  # generated images of each cluster in the report
ENCODED_TOGETHER = 500  # generated images; changes only speed and memory
# What a method does beside its `losses`, which is all that goes on here.
FURTHER_TRAINING = (
    *("e_step", "companions", "sampling_weights", "optimizer_step"),
    *("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"),
)


class GenerativeCalibration(ClusteringMethod):
    """Goes on with a clustering method, beside a diffusion model whose images it learns from.

    The arguments not listed here are those of `ClusteringMethod`. Letters are those of the module.

    Args of the networks:
        model: the method of the earlier run, which is trained; it takes the place of `backbone`.
        diffusion: makes images of a cluster.
        num_images: number of real images; each has a pseudo-label.

    Args of the generated images:
        images_per_cluster: M.
        dropped_share: share of the images that the diffusion model learns without their condition.

    Args of the objective:
        width_factors: the kernel is the mean of Gaussian ones, whose squared widths are w times these.
        matching_weight, separation_weight, metric_weight: a_c, a_s and a_m.
        margin: clusters that are so far apart in the kernel space, or farther, are not driven apart.
        temperature: tau.

    Args of the schedule:
        first_diffusion_epochs: epochs of the diffusion model in the first round; what it makes without any is noise.
        later_diffusion_epochs: those in each later round.
        calibration_epochs: epochs of the clustering in a round.
        diffusion_optimizer: makes the optimiser of the diffusion model; `optimizer` that of the clustering.

    Raises:
        InputError: if there is no earlier run, if it has other clusters or if its method does more than its losses.
    """

    num_views = 3  # two of the earlier run, and the image without augmentation
    pseudo_labels: Tensor
    generated: Tensor
    conditions: Tensor
    rounds_generated: Tensor
    agreement: Tensor

    def __init__(
        self,
        *,
        model: ClusteringMethod | None,
        diffusion: ConditionalDiffusion,
        num_images: PositiveInt,
        num_clusters: PositiveInt,
        images_per_cluster: PositiveInt,
        dropped_share: Fraction,
        width_factors: Annotated[Sequence[PositiveFloat], MinLen(1)],
        matching_weight: NonNegativeFloat,
        separation_weight: NonNegativeFloat,
        metric_weight: NonNegativeFloat,
        margin: NonNegativeFloat,
        temperature: PositiveFloat,
        first_diffusion_epochs: PositiveInt,
        later_diffusion_epochs: NonNegativeInt,
        calibration_epochs: PositiveInt,
        optimizer: Callable[..., Optimizer],
        diffusion_optimizer: Callable[..., Optimizer],
        schedule: Schedule,
    ) -> None:
        model = require_earlier_model(model, num_clusters, use="generative calibration goes on with", such_as="cc")
        check_model(model)
        super().__init__(
            backbone=model,  # the whole model takes its place, so that its weights are saved once
            num_clusters=num_clusters,
            optimizer=partial(OptimizerPerGroup, makers=(optimizer, diffusion_optimizer)),
            schedule=schedule,
            e_step_every_n_epochs=0,  # a round begins with it
        )
        self.diffusion = diffusion
        self.dropped_share = dropped_share
        self.width_factors = tuple(width_factors)
        self.matching_weight = matching_weight
        self.separation_weight = separation_weight
        self.metric_weight = metric_weight
        self.margin = margin
        self.temperature = temperature
        self.first_diffusion_epochs = first_diffusion_epochs
        self.later_diffusion_epochs = later_diffusion_epochs
        self.calibration_epochs = calibration_epochs
        # The state of the round, with which a resumed run goes on
        num_generated = num_clusters * images_per_cluster
        self.register_buffer("pseudo_labels", torch.zeros(num_images, dtype=torch.int64))
        self.register_buffer("generated", torch.zeros(num_generated, *diffusion.image_shape, dtype=torch.uint8))
        self.register_buffer("conditions", torch.arange(num_clusters).repeat_interleave(images_per_cluster))
        self.register_buffer("rounds_generated", torch.zeros((), dtype=torch.int64))
        self.register_buffer("agreement", torch.zeros(()))

    @property
    def model(self) -> ClusteringMethod:
        """The clustering that is trained."""
        return self.backbone  # type: ignore[return-value]

    def start_from(self, earlier: ClusteringMethod) -> None:
        self.load_weights(self.model, earlier)

    # Rounds

    @property
    def uses_generated_images(self) -> bool:
        """Whether the clustering learns from generated images at all; otherwise none are made."""
        return self.matching_weight + self.separation_weight + self.metric_weight > 0

    def locate_epoch(self) -> tuple[int, int, int]:
        """Return the round (from 1) of the current epoch, its place there (from 0) and the diffusion epochs there."""
        uses_diffusion = self.uses_generated_images
        return locate_epoch(
            self.current_epoch,
            first_diffusion_epochs=self.first_diffusion_epochs * uses_diffusion,
            later_diffusion_epochs=self.later_diffusion_epochs * uses_diffusion,
            calibration_epochs=self.calibration_epochs,
        )

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        number, place, diffusion_epochs = self.locate_epoch()
        if place == 0:
            self.run_e_step(self.current_epoch)
        if place == diffusion_epochs and self.uses_generated_images:
            started = time.perf_counter()
            with self.trainer.precision_plugin.forward_context():
                self.generate((self.trainer.datamodule.seed, number, "generate"))  # type: ignore[attr-defined]
            self.e_step_seconds += time.perf_counter() - started

    @torch.no_grad()
    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """Set the pseudo-labels: step 1 of a round.

        Raises:
            InputError: if the earlier run has no clustering of its own.
        """
        logits = self.model.cluster_logits(features.to(self.weight_dtype))
        if logits is None:
            raise InputError(
                f"the earlier run is of {type(self.model).__name__}, which has no clustering of its own",
                expected="a method that trains one, such as cc",
                do="set start=DIR to a run of such a method",
            )
        self.pseudo_labels.copy_(logits.argmax(1))

    def e_step_assignments(self) -> Tensor:
        return self.pseudo_labels

    # Step 1: the diffusion model

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        batch.refuse_extra_images("which belong to no cluster")
        *views, clean = batch.views
        trained, diffusion = (group["params"] for group in self.parameter_groups())
        _, place, diffusion_epochs = self.locate_epoch()
        if place < diffusion_epochs:
            terms, idle = self.diffusion_terms(clean, batch), trained
        else:
            self.model.is_optimizer_step = self.is_optimizer_step
            terms, idle = self.model.losses(batch.replace_views(*views)), diffusion
            if self.uses_generated_images:
                terms = terms | self.calibration_terms(clean, batch)
        self.leave_untrained(idle)
        # DDP expects a gradient of every parameter, so those that rest get one of 0.
        first = next(iter(terms))
        return terms | {first: terms[first] + 0.0 * torch.stack([p.sum() for p in idle]).sum()}

    def diffusion_terms(self, images: Tensor, batch: TrainBatch) -> dict[str, Tensor]:
        """Return the term of the diffusion model for images in [0, 1] (N, channels, H, W)."""
        steps = draw_values(batch, "steps", partial(torch.randint, len(self.diffusion.alphas_cumprod)))
        is_dropped = draw_values(batch, "dropped conditions", torch.rand) < self.dropped_share
        conditions = self.pseudo_labels[batch.indices].masked_fill(is_dropped, self.num_clusters)
        noise = batch.draws.normal_like(images, "noise")
        loss = self.compute_diffusion_loss(images, noise, steps, conditions)
        return {"diffusion": distributed.global_mean_factor(images) * loss}

    @replayable()
    def compute_diffusion_loss(self, images: Tensor, noise: Tensor, steps: Tensor, conditions: Tensor) -> Tensor:
        return self.diffusion.loss(images, noise, steps, conditions)

    # Step 2: the generated images

    @torch.no_grad()
    def generate(self, key: tuple[int | str, ...]) -> None:
        """Make the generated images of a round, and see in which clusters the clustering puts them."""
        num_generated = len(self.generated)
        clusters = torch.bincount(self.pseudo_labels, minlength=self.num_clusters).nonzero().squeeze(1)
        rows = torch.arange(num_generated, device=self.device)
        self.conditions.copy_(clusters[rows * len(clusters) // num_generated])
        self.generated.copy_(self.diffusion.generate(self.conditions, key))
        rank, num_processes = distributed.rank(), distributed.world_size()
        first, stop = (num_generated * r // num_processes for r in (rank, rank + 1))
        own_images = (self.to_images(part) for part in self.generated[first:stop].split(ENCODED_TOGETHER))
        logits = self.model.cluster_logits(self.encode_all(own_images, num_generated).to(self.weight_dtype))
        assert logits is not None
        self.agreement.copy_((logits.argmax(1) == self.conditions).float().mean())
        self.rounds_generated += 1

    def to_images(self, pixels: Tensor) -> Tensor:
        """Return images in [0, 1], of the dtype of the weights, of pixels (N, channels, H, W), which are uint8."""
        return pixels.to(self.weight_dtype) / 255

    # Step 3: the clustering

    def calibration_terms(self, images: Tensor, batch: TrainBatch) -> dict[str, Tensor]:
        """Return the weighted terms of a batch of clean images (N, channels, H, W) and as many generated ones."""
        rows = draw_values(batch, "generated images", partial(torch.randint, len(self.generated)))
        features = self.model.encode(torch.cat([images, self.to_images(self.generated[rows])]))
        with torch.no_grad():
            logits = self.model.cluster_logits(features)
        assert logits is not None
        real, generated = features.split(len(images))
        matching, separation, metric = self.compute_calibration_terms(
            distributed.all_gather_with_gradient(real),
            distributed.all_gather(self.pseudo_labels[batch.indices]),
            distributed.all_gather_with_gradient(generated),
            distributed.all_gather(self.conditions[rows]),
            distributed.all_gather(logits[len(images) :]),
        )
        return {
            "class_matching": self.matching_weight * matching,
            "class_separation": self.separation_weight * separation,
            "reliable_metric": self.metric_weight * metric,
        }

    @replayable()
    def compute_calibration_terms(
        self, real: Tensor, pseudo_labels: Tensor, generated: Tensor, conditions: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three unweighted terms of the features (N, D) of real and generated images of the global batch.

        Real images have pseudo-labels (N,), generated ones conditions (N,) and the logits (N, K) of the clustering.
        """
        distances, counts, _ = kernel_mean_distances(
            *(real, pseudo_labels, generated, conditions),
            num_clusters=self.num_clusters,
            width_factors=self.width_factors,
        )
        metric = reliable_metric_loss(
            *(generated, conditions, reliability(logits, conditions), real, pseudo_labels),
            temperature=self.temperature,
        )
        matching = class_matching_loss(distances, counts)
        return matching, class_separation_loss(distances, counts, margin=self.margin), metric

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.model.on_before_optimizer_step(optimizer)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trained weights of the clustering, and those of the diffusion model."""
        return [{"params": [p for p in part.parameters() if p.requires_grad]} for part in (self.model, self.diffusion)]

    def compile_networks(self, mode: str) -> None:
        self.model.compile_networks(mode)

    def log_terms(self, terms: dict[str, Tensor], loss: Tensor) -> None:
        super().log_terms(terms, loss)
        self.log("round/agreement", self.agreement)

    # What is shown, and the final clustering

    def sample_images(self, key: tuple[int | str, ...]) -> Tensor | None:
        """Return the first generated images of each cluster as of the last round, black for a cluster without any."""
        if not self.rounds_generated:
            return None
        num_shown = min(SAMPLES_PER_CLUSTER, len(self.generated) // self.num_clusters)
        clusters = torch.arange(self.num_clusters, device=self.device)
        first_rows = torch.searchsorted(self.conditions, clusters).clamp(max=len(self.generated) - num_shown)
        has_any = torch.isin(clusters, self.conditions)
        samples = self.to_images(self.generated[first_rows.unsqueeze(1) + torch.arange(num_shown, device=self.device)])
        return samples * has_any.reshape(-1, 1, 1, 1, 1)

    def encode(self, images: Tensor) -> Tensor:
        return self.model.encode(images)

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        return self.model.cluster_logits(features)


def check_model(model: ClusteringMethod) -> None:
    """Check that the method of the earlier run trains by its losses alone.

    Raises:
        InputError: if not.
    """
    further = [hook for hook in FURTHER_TRAINING if getattr(type(model), hook) is not getattr(ClusteringMethod, hook)]
    if further or model.num_views not in (None, 2):
        raise InputError(
            f"the earlier run is of {type(model).__name__}, whose training is more than a loss of two views",
            expected="a method that trains its own clustering by such a loss, such as cc, drc or tcc",
            do="set start=DIR to a run of such a method",
        )


def locate_epoch(
    epoch: int, *, first_diffusion_epochs: int, later_diffusion_epochs: int, calibration_epochs: int
) -> tuple[int, int, int]:
    """Return the round (from 1) of an epoch (from 0), its place there (from 0) and the round's diffusion epochs.

    The diffusion epochs of a round come first.
    """
    first_length = first_diffusion_epochs + calibration_epochs
    if epoch < first_length:
        return 1, epoch, first_diffusion_epochs
    later, place = divmod(epoch - first_length, later_diffusion_epochs + calibration_epochs)
    return 2 + later, place, later_diffusion_epochs


def draw_values(batch: TrainBatch, purpose: str, draw: Callable[..., Tensor]) -> Tensor:
    """Return values (N,), one for each image of a batch, of `draw`, such as torch.rand, for the global batch."""
    draws, device = batch.draws, batch.indices.device
    drawn = draw((draws.global_batch_size,), generator=draws.make_generator(purpose, device), device=device)
    return drawn[draws.local_rows(len(batch.indices))]


# Losses ---------------------------------------------------------------------------------------------------------------


def class_matching_loss(distances: Tensor, counts: Tensor) -> Tensor:
    """Return the mean distance of real and generated images of the same cluster, a scalar; 0 if no cluster has both.

    `distances` and `counts` (K, K) are those of `kernel_mean_distances`.
    """
    return mean_where(distances.diagonal(), counts.diagonal())


def class_separation_loss(distances: Tensor, counts: Tensor, *, margin: float) -> Tensor:
    """Return by how much different clusters are nearer than the margin, the mean over all pairs of two, a scalar.

    `distances` and `counts` (K, K) are those of `kernel_mean_distances`. It is 0 if there is no pair.
    """
    differs = ~torch.eye(len(counts), dtype=torch.bool, device=counts.device)
    return mean_where((margin - distances).relu(), counts & differs)


@full_precision
def reliability(logits: Tensor, conditions: Tensor) -> Tensor:
    """Return the probability r (N,), without gradient, of the conditions (N,) of images with cluster logits (N, K)."""
    return logits.detach().softmax(1).gather(1, conditions.unsqueeze(1)).squeeze(1)


@full_precision
def reliable_metric_loss(
    generated: Tensor,
    conditions: Tensor,
    reliabilities: Tensor,
    real: Tensor,
    pseudo_labels: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Return the contrast of generated images with the real ones, L_metric of the module, a scalar.

    The features are (M, D) of generated images, with conditions and reliabilities (M,), and (N, D) of real images, with
    pseudo-labels (N,). A generated image without a real one of its cluster does not count. Without any that counts, or
    if none is reliable at all, it is 0.
    """
    cosines = F.normalize(generated, dim=1) @ F.normalize(real, dim=1).T
    log_p = (cosines / temperature).log_softmax(1)
    is_partner = conditions.unsqueeze(1) == pseudo_labels
    num_partners = is_partner.sum(1)
    mean_log_p = torch.where(is_partner, log_p, 0).sum(1) / num_partners.clamp(min=1)
    weights = reliabilities * (num_partners > 0)
    total = weights.sum()
    return -(weights * mean_log_p).sum() / torch.where(total > 0, total, 1)
