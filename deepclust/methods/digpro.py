"""DigPro: dynamic grouping and prototype aggregation (arXiv 2401.13581).

DigPro is ProPos, with each view sent through the networks by itself, plus one loss, *dynamic grouping* (from SMoG, Pang
et al., ECCV 2022). K group vectors follow, batch by batch, the online projections that are assigned to them, and serve
as a classifier: the online prediction of one view has to be assigned to the group of the target projection of the other
view. Every K steps the groups are reset to the centroids of k-means on a bank of the latest projections. Alignment,
scattering (called aggregation in the paper), pseudo-labels by spherical k-means and the final clustering are those of
ProPos. Groups and clusters are unrelated.

Differs from the authors' code in:
- Several processes. Groups and bank take the rows of the global batch; prototypes and gradients are those of one
  process. The authors' code runs on one device; on more, the groups of the devices would drift apart.
- The k-means of the groups is this project's, with 10 restarts. Theirs is scikit-learn's, whose number of restarts
  depends on its version. Here it clusters the rows of the bank; theirs does so only with old versions of a package.
- Checkpoints hold the bank, so that a resumed run continues as if it had not stopped.
Two properties look like oversights, but are kept because the published results rest on them: the target moves twice a
step, and the predictor sees each view twice, without and with noise, which moves its running statistics twice as often.

Logged terms:
- `train/alignment`: -2 times the cosine between prediction and target (-2 is best).
- `train/scattering`: the weighted prototype scattering; 0 during warm-up.
- `train/group`: the weighted cross-entropy of the groups.
Images that only help the representation belong to no cluster and do not count in `train/scattering`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from deepclust.clustering.pseudo_labels import PseudoLabels
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.losses.alignment import alignment_loss
from deepclust.losses.prototypes import prototype_scattering_loss
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.ema import TargetNetwork, compute_ema_decay
from deepclust.nn.heads import init_linear_layers, two_layer_mlp
from deepclust.nn.one_hot import one_hot_mask
from deepclust.nn.schedules import Schedule
from deepclust.number_types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class DigPro(ClusteringMethod):
    """DigPro: the two-pass step of ProPos and a classification into groups that follow every batch.

    State between steps: the target network, the groups, the bank, and the pseudo-labels of all images.

    Args (`backbone`, `num_clusters`, `optimizer`, `schedule`, `e_step_every_n_epochs`: see `ClusteringMethod`):

        Networks
        embedding_size: the size D of projections and predictions.
        hidden_size: the number of hidden units of projector and predictor.
        first_ema_decay: the EMA decay of the target's first move in a step; None leaves this move out.
        ema_decay: m, the EMA decay of the target's second move, at the first step.
        ema_decay_end: the EMA decay of the second move at the last step; it changes by a cosine in between.
        predictor_lr_factor: the predictor's learning rate over that of backbone and projector.

        Objective
        temperature: tau, the temperature of prototype scattering.
        noise_std: sigma, the standard deviation of the noise of positive sampling.
        scattering_weight: lambda, the weight of prototype scattering.
        warmup_epochs: the number of first epochs without noise and scattering; the groups take part from the start.
        epochs: the number of epochs of the run, over which the EMA decay changes.

        Groups (there are `num_clusters` of them)
        group_weight: the weight of the group loss.
        group_temperature: the temperature of the group loss.
        group_decay: beta, how much of a group vector stays when a batch moves it.
        group_reset_every_n_steps: the number of optimiser steps between two resets of the groups.
        bank_size: the number of latest projections from which the groups are reset.

        E-step (spherical k-means; its three k-means settings also hold for the reset of the groups)
        num_images: the number of images M of the fit set, each of which has a pseudo-label.
        kmeans_restarts: the number of initialisations, of which the best result is kept.
        kmeans_max_iterations: the largest number of iterations of a restart.
        kmeans_tolerance: a restart stops when the centroids move by no more than this times the variance of the data.

    Raises:
        InputError: where the bank is smaller than the number of groups.
    """

    num_views = 2

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_images: PositiveInt,
        num_clusters: PositiveInt,
        embedding_size: PositiveInt,
        hidden_size: PositiveInt,
        temperature: PositiveFloat,
        noise_std: NonNegativeFloat,
        scattering_weight: NonNegativeFloat,
        group_weight: NonNegativeFloat,
        group_temperature: PositiveFloat,
        group_decay: Fraction,
        group_reset_every_n_steps: PositiveInt,
        bank_size: PositiveInt,
        warmup_epochs: NonNegativeInt,
        epochs: NonNegativeInt,
        first_ema_decay: Fraction | None,
        ema_decay: Fraction,
        ema_decay_end: Fraction,
        predictor_lr_factor: NonNegativeFloat,
        kmeans_restarts: PositiveInt,
        kmeans_max_iterations: PositiveInt,
        kmeans_tolerance: NonNegativeFloat,
        e_step_every_n_epochs: NonNegativeInt,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
    ) -> None:
        super().__init__(
            backbone=backbone,
            num_clusters=num_clusters,
            optimizer=optimizer,
            schedule=schedule,
            e_step_every_n_epochs=e_step_every_n_epochs,
        )
        if bank_size < num_clusters:
            raise InputError(
                f"method.bank_size is {bank_size}, but {num_clusters} groups are made from the bank",
                expected="at least one row of the bank for each group",
                do=f"set method.bank_size={num_clusters} or more",
            )
        self.projector = two_layer_mlp(backbone.num_features, hidden_size, embedding_size)  # type: ignore[arg-type]
        self.predictor = init_linear_layers(two_layer_mlp(embedding_size, hidden_size, embedding_size), std=0.01)
        self.target = TargetNetwork(self.backbone, self.projector)
        self.groups = MomentumGroups(num_groups=num_clusters, num_features=embedding_size, decay=group_decay)
        self.bank = FeatureBank(size=bank_size, num_features=embedding_size)
        self.pseudo_labels = PseudoLabels(
            num_images=num_images,
            num_clusters=num_clusters,
            num_features=embedding_size,
            restarts=kmeans_restarts,
            max_iterations=kmeans_max_iterations,
            tolerance=kmeans_tolerance,
        )
        self.temperature = temperature
        self.noise_std = noise_std
        self.scattering_weight = scattering_weight
        self.group_weight = group_weight
        self.group_temperature = group_temperature
        self.group_reset_every_n_steps = group_reset_every_n_steps
        self.warmup_epochs = warmup_epochs
        self.epochs = epochs
        self.first_ema_decay = first_ema_decay
        self.ema_decay = ema_decay
        self.ema_decay_end = ema_decay_end
        self.predictor_lr_factor = predictor_lr_factor
        self.kmeans_options = {
            "num_restarts": kmeans_restarts,
            "max_iterations": kmeans_max_iterations,
            "tolerance": kmeans_tolerance,
        }

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Return the weighted terms; also moves the target twice, moves or resets the groups, and fills the bank."""
        is_warmup = self.current_epoch < self.warmup_epochs
        noise_std = 0.0 if is_warmup else self.noise_std
        indices = None if batch.extra else batch.indices
        a, b = batch.views

        def draw_noise(q: Tensor, purpose: str) -> Tensor:
            return noise_std * batch.draws.normal_like(q, purpose) if noise_std else torch.zeros_like(q)

        self.reset_groups_or_update_target(batch.draws.key)
        q_a, k_b = self.online(a), self.target(b)
        terms_ab = self.compute_terms_and_update_groups(q_a, k_b, draw_noise(q_a, "noise of a"), indices)
        q_b, k_a = self.online(b), self.target(a)
        terms_ba = self.compute_terms_and_update_groups(q_b, k_a, draw_noise(q_b, "noise of b"), indices)
        q = torch.cat([distributed.all_gather(q_a), distributed.all_gather(q_b)])
        self.bank.push(F.normalize(q.to(self.bank.rows.dtype), dim=1))
        self.update_target()

        align, scatter, group = ((ab + ba) / 2 for ab, ba in zip(terms_ab, terms_ba, strict=True))
        scattering_weight = 0.0 if is_warmup or batch.extra else self.scattering_weight
        return {"alignment": align, "scattering": scattering_weight * scatter, "group": self.group_weight * group}

    def online(self, images: Tensor) -> Tensor:
        """Return the online network's projections q (N, D), not normalised."""
        return self.projector(self.backbone(images))

    def reset_groups_or_update_target(self, key: tuple[int | str, ...]) -> None:
        """Begin an optimiser step: reset the groups from the bank every so many steps, else move the target once.

        The random draws of the reset depend on `key`. Does nothing while gradients are accumulated.
        """
        if not self.is_optimizer_step:
            return
        if is_reset_step(self.global_step + 1, self.group_reset_every_n_steps):
            self.groups.reset_to_centroids(self.bank.rows, (*key, "groups"), **self.kmeans_options)
        elif self.first_ema_decay is not None:
            self.target.update(self.backbone, self.projector, decay=self.first_ema_decay)

    def update_target(self) -> None:
        """End an optimiser step: move the target by this step's EMA decay, in most steps for the second time.

        Does nothing while gradients are accumulated.
        """
        if not self.is_optimizer_step:
            return
        num_steps = self.epochs * self.steps_per_epoch
        decay = compute_ema_decay(self.global_step + 1, num_steps, start=self.ema_decay, end=self.ema_decay_end)
        self.target.update(self.backbone, self.projector, decay=decay)

    @replayable()
    def compute_terms_and_update_groups(
        self, q: Tensor, k: Tensor, noise: Tensor, indices: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the unweighted alignment, scattering and group loss of one direction; also moves the groups in place.

        q (N, D) are online projections of one view and k (N, D) target projections of the other view. Images without
        `indices` (N,) belong to no cluster, and their scattering is 0.
        """
        global_q = distributed.all_gather_with_gradient(q)
        updated_groups = self.groups.compute_update(global_q)
        # The assignments of k are those to the groups before the update.
        target_groups = self.groups.assign(k)
        predictions = self.predict(q, torch.zeros_like(q))
        group = group_loss(predictions, updated_groups, target_groups, temperature=self.group_temperature)
        self.groups.vectors.copy_(updated_groups.detach())

        align = alignment_loss(self.predict(q, noise), k)
        mean_factor = distributed.global_mean_factor(q)
        align, group = mean_factor * align, mean_factor * group
        if indices is None:
            return align, align.new_zeros(()), group
        pseudo_labels = self.pseudo_labels.assignments[distributed.all_gather(indices)]
        global_k = distributed.all_gather(k)
        scatter = prototype_scattering_loss(
            global_q, global_k, pseudo_labels, self.num_clusters, temperature=self.temperature
        )
        return align, scatter, group

    @full_precision  # bfloat16 would round the noise away
    def predict(self, q: Tensor, noise: Tensor) -> Tensor:
        """Return predictions (N, D) from the projections q (N, D) plus noise, which is positive sampling."""
        return self.predictor(q + noise)

    # The E-step and the final clustering

    def encode(self, images: Tensor) -> Tensor:
        return self.target(images)

    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        self.pseudo_labels.update(features, key)

    def e_step_assignments(self) -> Tensor:
        return self.pseudo_labels.assignments

    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.pseudo_labels.logits(features, temperature=self.temperature)

    # The optimiser

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [*self.backbone.parameters(), *self.projector.parameters()]},
            {"params": list(self.predictor.parameters()), "lr_factor": self.predictor_lr_factor},
        ]


class MomentumGroups(nn.Module):
    """K group vectors (K, D), not normalised, that follow the rows assigned to them; the optimiser does not train them.

    `decay` is beta: how much of a group vector stays when rows move it.
    """

    vectors: Tensor

    def __init__(self, *, num_groups: int, num_features: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("vectors", torch.rand(num_groups, num_features))

    def assign(self, rows: Tensor) -> Tensor:
        """Return the group (N,) with the largest cosine to each row (N, D); the first one of equal cosines."""
        cosines = F.normalize(rows.detach().double(), dim=1) @ F.normalize(self.vectors.double(), dim=1).T
        ties = cosines >= cosines.amax(1, keepdim=True) - 1e-12  # the rounding error of float64
        group_ids = torch.arange(len(self.vectors), device=rows.device)
        return torch.where(ties, group_ids, len(self.vectors) - 1).amin(1)

    @full_precision
    def compute_update(self, rows: Tensor) -> Tensor:
        """Return the group vectors (K, D) after an update with rows (N, D), not normalised; `vectors` stay as they are.

        A group becomes beta times itself plus 1 - beta times the mean of its rows; without rows it does not change. The
        result is differentiable in the rows.
        """
        members = one_hot_mask(self.assign(rows), len(self.vectors)).to(rows.dtype)
        sizes = members.sum(0).unsqueeze(1)
        means = members.T @ rows / sizes.clamp(min=1)
        return torch.where(sizes > 0, self.decay * self.vectors + (1 - self.decay) * means, self.vectors)

    def reset_to_centroids(self, rows: Tensor, key: tuple[int | str, ...], **kmeans_options: Any) -> None:
        """Replace the group vectors by the normalised centroids of Euclidean k-means on rows (M, D)."""
        result = kmeans_on_all_ranks(
            rows, num_clusters=len(self.vectors), metric="euclidean", key=key, **kmeans_options
        )
        self.vectors.copy_(F.normalize(result.centroids, dim=1))


class FeatureBank(nn.Module):
    """A ring buffer with about the last `size` rows (D) of unit length; it starts with random rows.

    A batch that reaches the end of the buffer fills it up to the end. The rest of that batch is dropped, and the next
    batch starts at position 0.
    """

    rows: Tensor
    position: Tensor

    def __init__(self, *, size: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, num_features), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Write rows (N, D) at the current position."""
        slots = self.position + torch.arange(len(rows), device=rows.device)
        is_written = slots < len(self.rows)
        # In place of a dropped row, the first row is written once more. So the number of dropped rows stays on the
        # device, and the host does not have to wait for it.
        source_rows = torch.where(is_written.unsqueeze(1), rows, rows[0])
        self.rows[torch.where(is_written, slots, slots[0])] = source_rows.to(self.rows.dtype)
        self.position.copy_(torch.where(slots[-1] + 1 < len(self.rows), slots[-1] + 1, 0))


@full_precision
def group_loss(predictions: Tensor, groups: Tensor, assignments: Tensor, *, temperature: float) -> Tensor:
    """Return the cross-entropy, a scalar, of predictions (N, D) classified by cosine into groups (K, D).

    `assignments` (N,) are the groups to which the target projections belong.
    """
    cosines = F.normalize(predictions, dim=1) @ F.normalize(groups, dim=1).T
    return F.cross_entropy(cosines / temperature, assignments)


def is_reset_step(step: int, every_n_steps: int) -> bool:
    """Return whether the groups are reset at `step` (from 1); they are never reset at the first."""
    return step > 1 and step % every_n_steps == 0
