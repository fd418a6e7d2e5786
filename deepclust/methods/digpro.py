"""DigPro: dynamic grouping and prototype aggregation (arXiv 2401.13581).

ProPos, each view through the networks on its own, with one loss more, *dynamic grouping* (from SMoG, Pang et al., ECCV
2022): K group vectors follow the online projections that fall to them, batch by batch, and serve as a classifier. The
online prediction of one view has to fall in the group in which the target puts the other view. Every K steps the groups
start anew from k-means on a bank of the latest projections. Alignment, scattering (here called aggregation),
pseudo-labels by spherical k-means and the final clustering are those of ProPos; groups and clusters have nothing to do
with each other.

Differs from the authors' code in:
- several processes: groups and bank take the rows of the global batch, and prototypes and gradients are those of one
  process; theirs runs on one device, and its groups would drift apart on more.
- the k-means of the groups is ours, with 10 restarts; theirs is scikit-learn's, whose number of restarts depends on its
  version. It clusters rows whatever the layout of the bank, which theirs does with old versions of a package only.
- the bank is kept in checkpoints, so that a run goes on as if it had not stopped.
What looks like an oversight there but is published behaviour is kept: a target that moves twice a step, and a predictor
that sees each view twice, with and without noise, so that its running statistics move twice as often.

Logged: `train/alignment`, -2 cosine between prediction and target (-2 is best); `train/scattering` and `train/group`,
weighted.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.distributed_kmeans import dealt_kmeans
from deepclust.clustering.pseudo_labels import PseudoLabels
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.losses.alignment import alignment
from deepclust.losses.prototypes import prototype_scattering_loss
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.ema import Target, decay_at
from deepclust.nn.heads import init_normal, mlp
from deepclust.nn.one_hot import one_hot_mask
from deepclust.nn.schedules import Schedule


class DigPro(ClusteringMethod):
    """DigPro: the two-pass step of ProPos and a classification into groups that every batch moves."""

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_images: int,
        num_clusters: int,
        embedding_size: int,
        hidden_size: int,
        temperature: float,
        noise_std: float,
        scattering_weight: float,
        group_weight: float,
        group_temperature: float,
        group_decay: float,
        group_reset_every_n_steps: int,
        bank_size: int,
        warmup_epochs: int,
        epochs: int,
        first_ema_decay: float | None,
        ema_decay: float,
        ema_decay_end: float,
        predictor_lr_factor: float,
        kmeans_restarts: int,
        kmeans_max_iterations: int,
        kmeans_tolerance: float,
        e_step_every_n_epochs: int,
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
                f"method.bank_size is {bank_size} and there are {num_clusters} groups to be made of it",
                expected="at least a row for each group",
                do=f"set method.bank_size={num_clusters} or more",
            )
        self.projector = mlp(backbone.num_features, hidden_size, embedding_size)  # type: ignore[arg-type]
        self.predictor = init_normal(mlp(embedding_size, hidden_size, embedding_size), std=0.01)
        self.target = Target(self.backbone, self.projector)
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
        self.kmeans = {
            "num_restarts": kmeans_restarts,
            "max_iterations": kmeans_max_iterations,
            "tolerance": kmeans_tolerance,
        }

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        on = self.current_epoch >= self.warmup_epochs
        align, scatter, group = self.objective(batch, noise_std=self.noise_std if on else 0.0)
        weight = self.scattering_weight if on and not batch.extra else 0.0
        return {"alignment": align, "scattering": weight * scatter, "group": self.group_weight * group}

    def objective(self, batch: TrainBatch, *, noise_std: float) -> tuple[Tensor, Tensor, Tensor]:
        """Alignment, scattering and group loss of one step, unweighted means of both directions; moves all state."""
        a, b = batch.views

        def noise(q: Tensor, purpose: str) -> Tensor:
            return noise_std * batch.draws.normal_like(q, purpose) if noise_std else torch.zeros_like(q)

        indices = None if batch.extra else batch.indices
        self.begin_step(batch.draws.key)
        q_a, k_b = self.online(a), self.target(b)
        ahead = self.direction(q_a, k_b, noise(q_a, "noise of a"), indices)
        q_b, k_a = self.online(b), self.target(a)
        back = self.direction(q_b, k_a, noise(q_b, "noise of b"), indices)
        rows = torch.cat([distributed.gather(q_a), distributed.gather(q_b)]).to(self.bank.rows.dtype)
        self.bank.push(F.normalize(rows, dim=1))
        self.end_step()
        align, scatter, group = ((x + y) / 2 for x, y in zip(ahead, back, strict=True))
        return align, scatter, group

    def online(self, images: Tensor) -> Tensor:
        """Raw projections q (N, D) of the online network."""
        return self.projector(self.backbone(images))

    def begin_step(self, key: tuple[int | str, ...]) -> None:
        """The target's first move; in its place, every so many steps, the groups start anew from the bank."""
        if not self.steps_now:
            return
        if resets_at(self.global_step + 1, self.group_reset_every_n_steps):
            self.groups.reset(self.bank.rows, (*key, "groups"), **self.kmeans)
        elif self.first_ema_decay is not None:
            self.target.follow(self.backbone, self.projector, decay=self.first_ema_decay)

    def end_step(self) -> None:
        """The target's second move, by this step's EMA decay."""
        if not self.steps_now:
            return
        num_steps = self.epochs * self.steps_per_epoch
        decay = decay_at(self.global_step + 1, num_steps, start=self.ema_decay, end=self.ema_decay_end)
        self.target.follow(self.backbone, self.projector, decay=decay)

    @replayable()
    def direction(self, q: Tensor, k: Tensor, noise: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Alignment, scattering and group loss of one direction: q online, k target, both (N, D); moves the groups.

        Images without `indices` (N,) belong to no cluster.
        """
        every_q = distributed.gather_with_gradient(q)
        moved = self.groups.moved(every_q)
        group = group_loss(
            self.predict(q, torch.zeros_like(q)), moved, self.groups.assign(k), temperature=self.group_temperature
        )
        self.groups.vectors.copy_(moved.detach())

        align = alignment(self.predict(q, noise), k)
        share = distributed.mean_weight(q)
        align, group = share * align, share * group
        if indices is None:
            return align, align.new_zeros(()), group
        labels = self.pseudo_labels.assignments[distributed.gather(indices)]
        every_k = distributed.gather(k)
        scatter = prototype_scattering_loss(every_q, every_k, labels, self.num_clusters, temperature=self.temperature)
        return align, scatter, group

    @full_precision  # bfloat16 would round the noise away
    def predict(self, q: Tensor, noise: Tensor) -> Tensor:
        """Predictions (N, D) for neighbours of the raw projections q (N, D): positive sampling."""
        return self.predictor(q + noise)

    # The E-step and the final clustering

    def encode(self, images: Tensor) -> Tensor:
        return self.target(images)

    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        self.pseudo_labels.renew(features, key)

    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.pseudo_labels.logits(features, temperature=self.temperature)

    # The optimiser

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [*self.backbone.parameters(), *self.projector.parameters()]},
            {"params": list(self.predictor.parameters()), "lr_factor": self.predictor_lr_factor},
        ]


class MomentumGroups(nn.Module):
    """K group vectors (K, D) of any length that follow the rows that fall to them; no optimiser step touches them."""

    vectors: Tensor

    def __init__(self, *, num_groups: int, num_features: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("vectors", torch.rand(num_groups, num_features))

    def assign(self, rows: Tensor) -> Tensor:
        """The group (N,) of the largest cosine with each row (N, D), the first of equal ones."""
        cosines = F.normalize(rows.detach().double(), dim=1) @ F.normalize(self.vectors.double(), dim=1).T
        ties = cosines >= cosines.amax(1, keepdim=True) - 1e-12  # what float64 may be off by
        ids = torch.arange(len(self.vectors), device=rows.device)
        return torch.where(ties, ids, len(self.vectors) - 1).amin(1)

    @full_precision
    def moved(self, rows: Tensor) -> Tensor:
        """The groups (K, D) after raw rows (N, D): a decaying mean, differentiable in the rows; none, no change."""
        members = one_hot_mask(self.assign(rows), len(self.vectors)).to(rows.dtype)
        sizes = members.sum(0).unsqueeze(1)
        means = members.T @ rows / sizes.clamp(min=1)
        return torch.where(sizes > 0, self.decay * self.vectors + (1 - self.decay) * means, self.vectors)

    def reset(self, rows: Tensor, key: tuple[int | str, ...], **kmeans: Any) -> None:
        """Put the unit centroids of Euclidean k-means on rows (M, D) in the place of the groups."""
        result = dealt_kmeans(rows, num_clusters=len(self.vectors), metric="euclidean", key=key, **kmeans)
        self.vectors.copy_(F.normalize(result.centroids, dim=1))


class FeatureBank(nn.Module):
    """About the last `size` unit rows (D), written round and round; random ones until it is full.

    A batch that reaches the end fills up to the end, the rest of that batch is dropped, and the next starts at 0.
    """

    rows: Tensor
    position: Tensor

    def __init__(self, *, size: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, num_features), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Write rows (N, D)."""
        slots = self.position + torch.arange(len(rows), device=rows.device)
        kept = slots < len(self.rows)
        # Those that are dropped write the first row once more, so that no device is asked how many they are.
        written = torch.where(kept.unsqueeze(1), rows, rows[0])
        self.rows[torch.where(kept, slots, slots[0])] = written.to(self.rows.dtype)
        self.position.copy_(torch.where(slots[-1] + 1 < len(self.rows), slots[-1] + 1, 0))


@full_precision
def group_loss(predictions: Tensor, groups: Tensor, assignments: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of the cosines of predictions (N, D) with groups (K, D) against the assignments (N,); a scalar."""
    cosines = F.normalize(predictions, dim=1) @ F.normalize(groups, dim=1).T
    return F.cross_entropy(cosines / temperature, assignments)


def resets_at(step: int, every_n_steps: int) -> bool:
    """Whether the groups start anew at `step` (from 1); never at the first."""
    return step > 1 and step % every_n_steps == 0
