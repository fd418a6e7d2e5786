"""ProPos: prototype scattering and positive sampling (Huang, Chen, Zhang, Shan; TPAMI 2022, arXiv 2111.11821).

ProPos keeps BYOL whole: the predictions of an online network (backbone, projector, predictor) are aligned with a target
network that follows it, without negatives. It adds two things. *Positive sampling* puts a little Gaussian noise on the
online projection before the predictor, so that a neighbour of the view is aligned instead of the view itself.
*Prototype scattering* averages the batch per pseudo-cluster in both networks. The online prototype of a cluster is
pulled to its target prototype and pushed away from the other online prototypes. Pseudo-labels come from spherical
k-means over the whole data set, on the target network, before every epoch. The final clustering is that same k-means.
With noise and scattering weight 0 this is BYOL.

Differs from the authors' code in:
- Several processes. Prototypes and the set of absent clusters belong to the global batch, the two views are kept apart,
  and the gradient equals that of one process. The authors' code takes the absent clusters of each device, mixes up the
  views in `joint` mode, and divides the scattering term by the number of devices. Their published weight of 0.1 ran on
  4 devices and therefore acted as 0.025, which is what the published recipes here use.
- Batch statistics. They are those of the whole batch that a process holds, and the target sees images in their order.
  Theirs are those of each device, and the target's images are shuffled over the devices. The published recipes here
  have both on any number of devices (`batch_norm_groups`, `shuffle_target`).
- The k-means sees one network: all processes use the running statistics of rank 0. Theirs partly differ by device.
- Accumulated gradients. An E-step comes after the optimiser step in which a pass over the data ends, while theirs can
  fall into the middle of one.
- Empty slots of the queue take no part. Theirs start as random rows that count as image 0.

Logged terms:
- `train/alignment`: -2 times the cosine between prediction and target (-2 is best).
- `train/scattering`: the weighted prototype scattering; 0 during warm-up.
Images that only help the representation, such as the unlabelled ones of STL-10, count in `train/alignment` only.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.pseudo_labels import PseudoLabels
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.losses.alignment import alignment_loss
from deepclust.losses.prototypes import prototype_scattering_loss
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.ema import TargetNetwork, compute_ema_decay
from deepclust.nn.heads import init_linear_layers, two_layer_mlp
from deepclust.nn.queue import Queue
from deepclust.nn.schedules import Schedule
from deepclust.number_types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class ProPos(ClusteringMethod):
    """ProPos, and BYOL where `scattering_weight` and `noise_std` are 0.

    State between steps: the target network, the pseudo-labels of all images, and the queue.

    Args (`backbone`, `num_clusters`, `optimizer`, `schedule`, `e_step_every_n_epochs`: see `ClusteringMethod`):

        Networks
        embedding_size: the size D of projections and predictions.
        hidden_size: the number of hidden units of projector and predictor.
        ema_decay: m, the target's EMA decay at the first step.
        ema_decay_end: the target's EMA decay at the last step; it changes by a cosine in between.
        shuffle_target: whether images pass the target in random order, so that its batch statistics, where a batch has
            several groups of them or several processes, are not those of the online network's images (MoCo).

        Objective
        step_order: `two_pass` sends each view through the networks by itself and moves the target afterwards;
            `joint` moves the target first and sends both views as one batch, so that batch normalisation sees 2N rows.
        temperature: tau, the temperature of prototype scattering.
        noise_std: sigma, the standard deviation of the noise of positive sampling.
        scattering_weight: lambda, the weight of prototype scattering.
        warmup_epochs: the number of first epochs without noise and scattering.
        epochs: the number of epochs of the run, over which the EMA decay changes.
        queue_size: the number of past target projections that join the prototypes of a batch; 0 means no queue.

        E-step (spherical k-means)
        num_images: the number of images M of the fit set, each of which has a pseudo-label.
        kmeans_restarts: the number of initialisations, of which the best result is kept.
        kmeans_max_iterations: the largest number of iterations of a restart.
        kmeans_tolerance: a restart stops when the centroids move by no more than this times the variance of the data.
        balanced_sampling: whether epochs draw images so that all pseudo-clusters appear equally often.

        Optimisation
        predictor_lr_factor: the predictor's learning rate over that of backbone and projector.
        decay_biases_and_norms: whether weight decay also acts on biases and batch normalisation; `by_name`: on those
            whose name in the authors' networks tells neither, which are the weights of batch normalisation outside of
            the main path of residual blocks: after the stem, in shortcuts, in the projector and in the predictor.
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
        step_order: Literal["two_pass", "joint"],
        temperature: PositiveFloat,
        noise_std: NonNegativeFloat,
        scattering_weight: NonNegativeFloat,
        warmup_epochs: NonNegativeInt,
        epochs: NonNegativeInt,
        ema_decay: Fraction,
        ema_decay_end: Fraction,
        shuffle_target: bool,
        queue_size: NonNegativeInt,
        balanced_sampling: bool,
        predictor_lr_factor: NonNegativeFloat,
        decay_biases_and_norms: bool | Literal["by_name"],
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
        self.projector = two_layer_mlp(backbone.num_features, hidden_size, embedding_size)  # type: ignore[arg-type]
        self.predictor = init_linear_layers(two_layer_mlp(embedding_size, hidden_size, embedding_size), std=0.01)
        self.target = TargetNetwork(self.backbone, self.projector)
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
        self.shuffle_target = shuffle_target
        self.balanced_sampling = balanced_sampling
        self.predictor_lr_factor = predictor_lr_factor
        self.decay_biases_and_norms = decay_biases_and_norms

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Return the weighted terms; also moves the target network and adds the target projections to the queue."""
        is_warmup = self.current_epoch < self.warmup_epochs
        a, b = batch.views
        if self.step_order == "joint":
            self.update_target()
            q, k = self.online(torch.cat([a, b])), self.project_target(torch.cat([b, a]), batch.draws, "b and a")
        else:
            q = torch.cat([self.online(a), self.online(b)])
            k = torch.cat([self.project_target(b, batch.draws, "b"), self.project_target(a, batch.draws, "a")])
            self.update_target()
        noise = torch.zeros_like(q) if is_warmup else self.draw_noise(q, batch.draws)
        indices = None if batch.extra else batch.indices
        alignment_term, scattering_term = self.compute_terms(q, k, noise, indices)
        if self.queue is not None and indices is not None:
            k_b, k_a = k.chunk(2)
            global_indices = distributed.all_gather(indices).repeat(2)
            self.queue.push(torch.cat([distributed.all_gather(k_b), distributed.all_gather(k_a)]), global_indices)
        scattering_weight = 0.0 if is_warmup or batch.extra else self.scattering_weight
        return {"alignment": alignment_term, "scattering": scattering_weight * scattering_term}

    def online(self, images: Tensor) -> Tensor:
        """Return the online network's projections q (N, D), not normalised."""
        return self.projector(self.backbone(images))

    def project_target(self, images: Tensor, draws: Draws, views: Literal["b and a", "b", "a"]) -> Tensor:
        """Return the target's unit projections k (V * N, D) of images (V * N, ...), one view after the other.

        With `shuffle_target`, they pass the target in random order over views and processes, and return to their own.
        """
        if not self.shuffle_target:
            return self.target(images)
        num_views = len(views.split(" and "))
        own = draws.local_rows(len(images) // num_views)
        all_images = distributed.all_gather_views(images, num_views)
        generator = draws.make_generator(f"order in the target of {views}", images.device)
        order = torch.randperm(len(all_images), generator=generator, device=images.device)
        k = self.target(all_images[order.unflatten(0, (num_views, -1))[:, own].flatten()])
        k = distributed.all_gather_views(k, num_views)[order.argsort()]
        return k.unflatten(0, (num_views, -1))[:, own].flatten(0, 1)

    def update_target(self) -> None:
        """Move the target towards the online network by this step's EMA decay.

        Does nothing while gradients are accumulated, so that the target moves once per optimiser step.
        """
        if not self.is_optimizer_step:
            return
        num_steps = self.epochs * self.steps_per_epoch
        decay = compute_ema_decay(self.global_step + 1, num_steps, start=self.ema_decay, end=self.ema_decay_end)
        self.target.update(self.backbone, self.projector, decay=decay)

    def draw_noise(self, q: Tensor, draws: Draws) -> Tensor:
        """Return the noise of positive sampling for the projections q (2N, D) of views a and b."""
        if not self.noise_std:
            return torch.zeros_like(q)
        q_a, q_b = q.chunk(2)
        standard_normal = [draws.normal_like(q_a, "noise of a"), draws.normal_like(q_b, "noise of b")]
        return self.noise_std * torch.cat(standard_normal)

    @replayable()
    def compute_terms(self, q: Tensor, k: Tensor, noise: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the unweighted alignment and scattering, means over both directions.

        `q` (2N, D) holds the projections of views a and b, `k` (2N, D) the target projections of views b and a. Images
        without `indices` (N,) belong to no cluster, and their scattering is 0.
        """
        directions = [(q, k, noise)]
        if self.step_order == "two_pass":
            directions = list(zip(q.chunk(2), k.chunk(2), noise.chunk(2), strict=True))
        align = torch.stack([alignment_loss(self.predict(q, noise), k) for q, k, noise in directions]).mean()
        align = distributed.global_mean_factor(q) * align
        if indices is None:
            return align, align.new_zeros(())
        (q_a, q_b), (k_b, k_a) = q.chunk(2), k.chunk(2)
        scatter = (self.scattering_loss(q_a, k_b, indices) + self.scattering_loss(q_b, k_a, indices)) / 2
        return align, scatter

    @full_precision  # bfloat16 would round the noise away
    def predict(self, q: Tensor, noise: Tensor) -> Tensor:
        """Return predictions (N, D) from the projections q (N, D) plus noise, which is positive sampling."""
        return self.predictor(q + noise)

    def scattering_loss(self, q: Tensor, k: Tensor, indices: Tensor) -> Tensor:
        """Return the prototype scattering of one direction over the global batch and the queue, a scalar.

        q (N, D) are online and k (N, D) target projections of the images `indices` (N,).
        """
        q, k = distributed.all_gather_with_gradient(q), distributed.all_gather(k)
        indices = distributed.all_gather(indices)
        assignments = self.pseudo_labels.assignments
        pseudo_labels = assignments[indices]
        if self.queue is not None:
            # -1, no cluster, for the empty slots of the queue.
            queue_labels = torch.where(self.queue.indices >= 0, assignments[self.queue.indices], -1)
            pseudo_labels = torch.cat([pseudo_labels, queue_labels])
            q, k = torch.cat([q, self.queue.rows]), torch.cat([k, self.queue.rows])
        return prototype_scattering_loss(q, k, pseudo_labels, self.num_clusters, temperature=self.temperature)

    # The E-step and the final clustering

    def encode(self, images: Tensor) -> Tensor:
        return self.target(images)

    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        self.pseudo_labels.update(features, key)

    def e_step_assignments(self) -> Tensor:
        return self.pseudo_labels.assignments

    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.pseudo_labels.logits(features, temperature=self.temperature)

    def sampling_weights(self) -> Tensor | None:
        if not self.balanced_sampling:
            return None
        return balanced_sampling_weights(self.pseudo_labels.assignments, self.num_clusters)

    # The optimiser

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for network, lr_factor in (
            (self.backbone, 1.0),
            (self.projector, 1.0),
            (self.predictor, self.predictor_lr_factor),
        ):
            named = list(network.named_parameters())
            if self.decay_biases_and_norms == "by_name":
                is_bias_or_norm = [is_bias_or_norm_by_name(name) for name, _ in named]
            else:
                is_bias_or_norm = [p.dim() <= 1 for _, p in named]
            weights = [p for (_, p), excluded in zip(named, is_bias_or_norm, strict=True) if not excluded]
            biases_and_norms = [p for (_, p), included in zip(named, is_bias_or_norm, strict=True) if included]
            groups += [{"params": parameters, "lr_factor": lr_factor} for parameters in (weights, biases_and_norms)]
            if self.decay_biases_and_norms is not True:
                groups[-1]["weight_decay"] = 0.0
        return groups


def is_bias_or_norm_by_name(name: str) -> bool:
    """Return whether a parameter of the backbone, projector or predictor is a bias, or is called `bn...` in a block.

    The authors exclude what has "bias" or "bn" in its name. In their backbone, a sequence of the parts of a ResNet, the
    batch normalisation after the stem has a number as its name, as have those of shortcuts and heads.
    """
    return name.endswith("bias") or re.search(r"layer\d+\.\d+\.bn\d+\.", name) is not None


def balanced_sampling_weights(assignments: Tensor, num_clusters: int) -> Tensor:
    """Return a sampling weight for each image (M,), M over the size of its cluster, from assignments (M,)."""
    counts = torch.bincount(assignments, minlength=num_clusters)
    return len(assignments) / counts[assignments].float()
