"""DEC and IDEC: deep embedded clustering.

DEC: Xie, Girshick and Farhadi, ICML 2016, arXiv 1511.06335. IDEC: Guo, Gao, Liu and Yin, IJCAI 2017.

Both start from an auto-encoder (`deepclust.methods.autoencoder`). k-means on its embeddings gives K centres. The soft
assignment q of an image falls with its distance from each centre as Student's t-distribution does. Every so many steps
the assignments of all images are sharpened into a target p: q squared, over the size of the cluster. Then encoder and
centres are trained towards this target with KL(p || q). IDEC trains the decoder on, too, and adds the reconstruction
loss, so that the embedding keeps what tells images apart. Training stops when hardly an image has changed its cluster
between two targets. DEC is `reconstruction_weight: 0`.

The numbers and the details are those of the later code by the first author of IDEC (Guo, DEC-keras), which published
ten logged runs of each data set, and of IDEC's code.

Differs from these codes in:
- The result. It is the assignment by the last weights. That is the authors' own, the one of the last target, where
  training has stopped by itself. Where `trainer.max_steps` ends it, they leave out the steps since the last target.
- Pre-training of IDEC. It is that of DEC-keras. IDEC's code starts from weights of DEC's own, which were trained layer
  by layer.
- Pixels of IDEC. They lie in [0, 1] (theirs: 0 to 5.1 on MNIST, 0 to 2 on USPS).
- Batches. A last batch of less than an eighth of a batch joins the one before, and there is no empty batch where the
  number of images is a multiple of the batch size.
- Empty clusters. A cluster to which no image is assigned at all has the target 0 (theirs: 0 / 0).
- Logarithms. They are exact (theirs: of values that are at least 1e-7).
- Momentum. It goes on when the target is renewed, as in the later code (DEC's own begins anew).
- Several processes. The target is made of the images of all processes; a run equals that of one process.

Logged:
- `train/clustering`: the weighted divergence KL(p || q).
- `train/reconstruction`: the weighted mean over all pixels of the squared difference; IDEC only.
- `target/changed`: the share of images whose cluster differed between the last two targets.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from deepclust.clustering.student_assignments import student_logits, target_distribution, target_divergence
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.losses.reconstruction import reconstruction_loss
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.decoder import find_decoder
from deepclust.nn.schedules import Schedule
from deepclust.number_types import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt

log = logging.getLogger(__name__)


class DEC(ClusteringMethod):
    """DEC, and with a `reconstruction_weight` IDEC, on the auto-encoder of an earlier run.

    The arguments not listed here are those of `ClusteringMethod`. The E-step renews the target.

    Args of the networks:
        backbone: the encoder, from images to embeddings (N, D).
        decoder: from embeddings (N, D) to images. It is used and trained only with a `reconstruction_weight`.
        num_images: number M of images that are clustered; each has a target.

    Args of the objective:
        alpha: degrees of freedom a of Student's t-distribution.
        clustering_weight: weight of the divergence of the assignments from their target (IDEC's gamma).
        reconstruction_weight: weight of the reconstruction loss; 0 is DEC.

    Args of the schedule:
        target_every_n_steps: the target is renewed before the first step and then every so many optimiser steps.
        stop_below: training stops at a target if the share of images that have changed their cluster since the last one
            is lower; 0: never.
        shuffle: whether an epoch takes the images in random order; otherwise in that of the data set.

    Args of the k-means that sets the centres:
        kmeans_restarts: number of restarts, of which the best result is kept.
        kmeans_max_iterations: largest number of iterations of a restart.
        kmeans_tolerance: tolerance of the convergence test of a restart.
    """

    num_views = 1
    targets: Tensor
    assignments: Tensor
    targets_made: Tensor
    num_changed: Tensor
    has_converged: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        decoder: nn.Module,
        num_images: PositiveInt,
        num_clusters: PositiveInt,
        alpha: PositiveFloat,
        clustering_weight: NonNegativeFloat,
        reconstruction_weight: NonNegativeFloat,
        target_every_n_steps: PositiveInt,
        stop_below: Fraction,
        shuffle: bool,
        kmeans_restarts: PositiveInt,
        kmeans_max_iterations: PositiveInt,
        kmeans_tolerance: NonNegativeFloat,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
    ) -> None:
        super().__init__(
            backbone=backbone,
            num_clusters=num_clusters,
            optimizer=optimizer,
            schedule=schedule,
            e_step_every_n_epochs=0,  # the target is renewed after so many steps
        )
        self.decoder = decoder if reconstruction_weight else None
        self.centres = nn.Parameter(torch.zeros(num_clusters, backbone.num_features))  # type: ignore[call-overload]
        self.alpha = alpha
        self.clustering_weight = clustering_weight
        self.reconstruction_weight = reconstruction_weight
        self.target_every_n_steps = target_every_n_steps
        self.stop_below = stop_below
        self.shuffle = shuffle
        self.kmeans_restarts = kmeans_restarts
        self.kmeans_max_iterations = kmeans_max_iterations
        self.kmeans_tolerance = kmeans_tolerance
        # What follows is as of the last target; a resumed run goes on with it.
        self.register_buffer("targets", torch.zeros(num_images, num_clusters))
        self.register_buffer("assignments", torch.zeros(num_images, dtype=torch.int64))
        self.register_buffer("targets_made", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_changed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("has_converged", torch.zeros((), dtype=torch.bool))

    def start_from(self, earlier: ClusteringMethod) -> None:
        super().start_from(earlier)
        if self.decoder is not None:
            self.load_weights(self.decoder, find_decoder(earlier, autoencoder="autoencoder"))

    # The target

    def on_train_start(self) -> None:
        if not self.targets_made:
            self.require_earlier_run("DEC clusters the embeddings", stage="autoencoder")
        if self.has_converged:  # a run that was interrupted after its last step
            self.trainer.should_stop = True

    def on_train_batch_start(self, batch: TrainBatch, batch_idx: int) -> int | None:
        """Renew the target where it is due; -1, at which Lightning ends the epoch, where that ends training."""
        step = self.global_step
        # Where gradients are accumulated, several batches begin at the same step.
        if step % self.target_every_n_steps or step // self.target_every_n_steps < int(self.targets_made):
            return None
        self.run_e_step(self.current_epoch)
        if not self.has_converged:
            return None
        log.info("stopped after step %d: %d images have changed their cluster", step, int(self.num_changed))
        self.trainer.should_stop = True
        return -1

    @torch.no_grad()
    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """Set the centres, the first time, and renew the target of all images."""
        features = features.to(self.weight_dtype)
        if not self.targets_made:
            centres, assignments = self.find_centres(features, key)
            self.centres.copy_(centres)
            self.assignments.copy_(assignments)
        self.renew_targets(student_logits(features, self.centres, alpha=self.alpha).softmax(1))

    def find_centres(self, features: Tensor, key: tuple[int | str, ...]) -> tuple[Tensor, Tensor]:
        """Return centres (K, D) of the embeddings (M, D) and assignments (M,) to them, by k-means."""
        result = kmeans_on_all_ranks(
            features,
            num_clusters=self.num_clusters,
            metric="euclidean",
            num_restarts=self.kmeans_restarts,
            max_iterations=self.kmeans_max_iterations,
            tolerance=self.kmeans_tolerance,
            key=key,
        )
        return result.centroids, result.assignments

    @torch.no_grad()
    def renew_targets(self, probabilities: Tensor) -> None:
        """Make the target of the soft assignments (M, K) of all images, and find out whether training has converged."""
        self.targets.copy_(target_distribution(probabilities))
        assignments = probabilities.argmax(1)
        self.num_changed.copy_((assignments != self.assignments).sum())
        # The first target never stops: it is compared with k-means, which found the same clusters.
        share_changed = int(self.num_changed) / len(assignments)
        self.has_converged.fill_(share_changed < self.stop_below and int(self.targets_made) > 0)
        self.assignments.copy_(assignments)
        self.targets_made += 1

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        batch.refuse_extra_images("and DEC has targets only for the images that are clustered")
        images = batch.views[0]
        embeddings = self.backbone(images)
        reconstructions = None if self.decoder is None else self.decoder(embeddings)
        terms = self.compute_terms(embeddings, self.targets[batch.indices], images, reconstructions)
        factor = distributed.global_mean_factor(images)
        return {name: factor * term for name, term in terms.items()}

    @replayable()
    def compute_terms(
        self, embeddings: Tensor, targets: Tensor, images: Tensor, reconstructions: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the weighted terms of embeddings (N, D) with targets (N, K), and of images and reconstructions."""
        logits = student_logits(embeddings, self.centres, alpha=self.alpha)
        terms = {"clustering": self.clustering_weight * target_divergence(targets, logits)}
        if reconstructions is not None:
            terms["reconstruction"] = self.reconstruction_weight * reconstruction_loss(reconstructions, images)
        return terms

    def log_terms(self, terms: dict[str, Tensor], loss: Tensor) -> None:
        super().log_terms(terms, loss)
        self.log("target/changed", self.num_changed / len(self.assignments))

    def e_step_assignments(self) -> Tensor:
        return self.assignments

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        return student_logits(features, self.centres, alpha=self.alpha) if self.targets_made else None
