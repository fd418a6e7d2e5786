"""ProPos: prototype scattering and positive sampling (Huang, Chen, Zhang, Shan; TPAMI 2022, arXiv 2111.11821).

BYOL is kept whole: an online encoder, projector and predictor align with a target that follows them, without negatives.
Two things are added. *Positive sampling*: a little Gaussian noise on the online projection before the predictor, so
that a neighbour of the view, not the view itself, is aligned. *Prototype scattering*: the batch is averaged per
pseudo-cluster in both networks; the online prototype of a cluster is pulled to its target prototype and pushed from the
other online ones. Pseudo-labels come from spherical k-means over the whole set, on the target network, before every
epoch; the final clustering is that same k-means. Without the two terms (weight and noise 0) this is BYOL.

Differs from the authors' code in:
- several processes: prototypes, and the set of absent clusters, belong to the global batch, views are kept apart, and
  the gradient is that of one process. Theirs takes the absent clusters of each device, mixes the views up in `joint`
  mode, and divides the scattering term by the number of devices; their published weight 0.1 ran on 4 devices, so it
  acted as 0.025, which is what the published recipes here use.
- the k-means runs on one copy of the network: running statistics are rank 0's (theirs differ by device in part).
- empty slots of the queue take no part (theirs start as random rows of image 0).

Logged: `train/alignment`, -2 cosine between prediction and target (-2 is best); `train/scattering`, weighted.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.pseudo_labels import PseudoLabels
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.losses.alignment import alignment
from deepclust.losses.prototypes import prototype_scattering_loss
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.ema import Target, decay_at
from deepclust.nn.heads import init_normal, mlp
from deepclust.nn.queue import Queue
from deepclust.nn.schedules import Schedule


class ProPos(ClusteringMethod):
    """ProPos, and BYOL where `scattering_weight` and `noise_std` are 0.

    `step_order` is the authors': `two_pass` sends each view through the networks on its own and moves the target after
    the losses; `joint` moves the target first and sends both views through as one batch (batch statistics of 2N rows).
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_images: int,
        num_clusters: int,
        embedding_size: int,
        hidden_size: int,
        step_order: Literal["two_pass", "joint"],
        temperature: float,
        noise_std: float,
        scattering_weight: float,
        warmup_epochs: int,
        epochs: int,
        ema_decay: float,
        ema_decay_end: float,
        queue_size: int,
        balanced_sampling: bool,
        predictor_lr_factor: float,
        decay_biases_and_norms: bool,
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
        self.projector = mlp(backbone.num_features, hidden_size, embedding_size)  # type: ignore[arg-type]
        self.predictor = init_normal(mlp(embedding_size, hidden_size, embedding_size), std=0.01)
        self.target = Target(self.backbone, self.projector)
        self.pseudo_labels = PseudoLabels(
            num_images=num_images,
            num_clusters=num_clusters,
            num_features=embedding_size,
            restarts=kmeans_restarts,
            max_iterations=kmeans_max_iterations,
            tolerance=kmeans_tolerance,
        )
        self.queue = Queue(size=queue_size, num_features=embedding_size) if queue_size else None
        self.step_order = step_order
        self.temperature = temperature
        self.noise_std = noise_std
        self.scattering_weight = scattering_weight
        self.warmup_epochs = warmup_epochs
        self.epochs = epochs
        self.ema_decay = ema_decay
        self.ema_decay_end = ema_decay_end
        self.balanced_sampling = balanced_sampling
        self.predictor_lr_factor = predictor_lr_factor
        self.decay_biases_and_norms = decay_biases_and_norms

    # The networks

    def online(self, images: Tensor) -> Tensor:
        """Raw projections q (N, D) of the online network."""
        return self.projector(self.backbone(images))

    def update_target(self) -> None:
        """Move the target towards the online network by this step's EMA decay, once an optimiser step."""
        if not self.steps_now:
            return
        num_steps = self.epochs * self.steps_per_epoch
        decay = decay_at(self.global_step + 1, num_steps, start=self.ema_decay, end=self.ema_decay_end)
        self.target.follow(self.backbone, self.projector, decay=decay)

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        on = self.current_epoch >= self.warmup_epochs
        align, scatter = self.objective(batch, noise_std=self.noise_std if on else 0.0)
        weight = self.scattering_weight if on and not batch.extra else 0.0
        return {"alignment": align, "scattering": weight * scatter}

    def objective(self, batch: TrainBatch, *, noise_std: float) -> tuple[Tensor, Tensor]:
        """Alignment and (unweighted) scattering of one step, means of both directions; moves the target."""
        a, b = batch.views
        if self.step_order == "joint":
            self.update_target()
            q, k = self.online(torch.cat([a, b])), self.target(torch.cat([b, a]))
        else:
            q = torch.cat([self.online(a), self.online(b)])
            k = torch.cat([self.target(b), self.target(a)])
            self.update_target()
        noise = torch.zeros_like(q)
        if noise_std:
            purposes = ("noise of a", "noise of b")
            parts = [batch.draws.normal_like(half, p) for half, p in zip(q.chunk(2), purposes, strict=True)]
            noise = noise_std * torch.cat(parts)
        return self.terms(q, k, noise, None if batch.extra else batch.indices)

    @replayable()
    def terms(self, q: Tensor, k: Tensor, noise: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor]:
        """Alignment and scattering of the raw projections q (2N, D) of views a and b with their targets k; fills the
        queue. Images without `indices` (N,) belong to no cluster."""
        halves = [(q, k, noise)]
        if self.step_order == "two_pass":
            halves = list(zip(q.chunk(2), k.chunk(2), noise.chunk(2), strict=True))
        align = torch.stack([alignment(self.predict(q, noise), k) for q, k, noise in halves]).mean()
        align = distributed.mean_weight(q) * align
        if indices is None:
            return align, align.new_zeros(())
        (q_a, q_b), (k_b, k_a) = q.chunk(2), k.chunk(2)
        scatter = (self.scatter(q_a, k_b, indices) + self.scatter(q_b, k_a, indices)) / 2
        if self.queue is not None:
            images = distributed.gather(indices).repeat(2)
            self.queue.push(torch.cat([distributed.gather(k_b), distributed.gather(k_a)]), images)
        return align, scatter

    @full_precision  # bfloat16 would round the noise away
    def predict(self, q: Tensor, noise: Tensor) -> Tensor:
        """Predictions (N, D) for neighbours of the raw projections q (N, D): positive sampling."""
        return self.predictor(q + noise)

    def scatter(self, q: Tensor, k: Tensor, indices: Tensor) -> Tensor:
        """Prototype scattering of one direction over the global batch: q online, k target, both (N, D)."""
        q, k = distributed.gather_with_gradient(q), distributed.gather(k)
        indices = distributed.gather(indices)
        assignments = self.pseudo_labels.assignments
        labels = assignments[indices]
        if self.queue is not None:
            past = torch.where(self.queue.indices >= 0, assignments[self.queue.indices], -1)
            labels = torch.cat([labels, past])
            q, k = torch.cat([q, self.queue.rows]), torch.cat([k, self.queue.rows])
        return prototype_scattering_loss(q, k, labels, self.num_clusters, temperature=self.temperature)

    # The E-step and the final clustering

    def encode(self, images: Tensor) -> Tensor:
        return self.target(images)

    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        self.pseudo_labels.renew(features, key)

    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.pseudo_labels.logits(features, temperature=self.temperature)

    def sampling_weights(self) -> Tensor | None:
        if not self.balanced_sampling:
            return None
        return balanced_weights(self.pseudo_labels.assignments, self.num_clusters)

    # The optimiser

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for module, factor in (
            (self.backbone, 1.0),
            (self.projector, 1.0),
            (self.predictor, self.predictor_lr_factor),
        ):
            weights = [p for p in module.parameters() if p.dim() > 1]
            others = [p for p in module.parameters() if p.dim() <= 1]  # biases, batch normalisation
            groups.append({"params": weights, "lr_factor": factor})
            groups.append({"params": others, "lr_factor": factor})
            if not self.decay_biases_and_norms:
                groups[-1]["weight_decay"] = 0.0
        return groups


def balanced_weights(labels: Tensor, num_clusters: int) -> Tensor:
    """Sampling weight of each image (M,): data-set size over the size of its cluster."""
    counts = torch.bincount(labels, minlength=num_clusters)
    return len(labels) / counts[labels].float()
