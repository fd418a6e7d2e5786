"""DECS: deep embedding clustering driven by sample stability (Cheng, Li, Wang and Qian, IJCAI 2024, arXiv 2401.15989).

An auto-encoder (`method=conv_autoencoder`) learns to reconstruct images that are shifted and rotated a little. k-means
on its embeddings gives K centres. The soft assignment q of an image falls with its distance from each centre as
Student's t-distribution does. Then encoder and centres are trained, without any target. A threshold t by Otsu's rule
tells the large assignments of a batch from the small ones. The determinacy of an assignment is how far it lies from t,
as a share of the way to 0 or to 1. The stability of an image is the mean of its K determinacies, less their weighted
variance. Training raises the mean of the stabilities in a batch, and their variance.

An image that is certain of its cluster is stable in whatever cluster it is, so nothing but the first centres keeps all
images from one cluster. The auto-encoder is therefore trained for long, and a run warns of clusters that become empty.

The details are those of the authors' code; the paper was not compared. Differs from the code in:
- Threshold. It is kept within 0.001 and 0.999, since at 0 the gradient of their code is not a number.
- Batches. A last batch of less than an eighth of a batch joins the one before, and there is no empty batch where the
  number of images is a multiple of the batch size.
- Several processes. Threshold, mean and variance are those of the whole batch; a run equals that of one process where
  batch statistics are those of all processes, too.

Logged:
- `train/instability`: 1 less the mean of the stabilities. 0: all assignments are certain.
- `train/stability_variance`: minus the weighted variance of the stabilities in a batch.
- `train/reconstruction`: the weighted mean over all pixels of the squared difference, if it has a weight.
- `train/threshold`: the threshold t between small and large assignments.
- `train/smallest_cluster`, `train/largest_cluster`: their shares of the images of an epoch, at its end.
"""

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from deepclust.clustering.student_assignments import student_logits
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.losses.reconstruction import reconstruction_loss
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.decoder import find_decoder
from deepclust.nn.one_hot import one_hot_mask
from deepclust.nn.schedules import Schedule
from deepclust.number_types import NonNegativeFloat, PositiveFloat, PositiveInt

log = logging.getLogger(__name__)

SMALLEST_THRESHOLD, LARGEST_THRESHOLD = 0.001, 0.999
Determinacy = Literal["linear", "quadratic"]


class DECS(ClusteringMethod):
    """DECS, on the auto-encoder of an earlier run.

    The arguments not listed here are those of `ClusteringMethod`. The E-step runs once and sets the centres.

    Args of the networks:
        backbone: the encoder, from images to embeddings (N, D).
        decoder: from embeddings (N, D) to images. It is used and trained only with a `reconstruction_weight`.

    Args of the objective:
        alpha: degrees of freedom a of Student's t-distribution.
        threshold_bins: number of bins of the histogram from which the threshold is chosen.
        determinacy: how it grows with the distance from the threshold, both between 0 and 1.
        variance_weight: weight of the variance of the determinacies of an image in its stability.
        batch_variance_weight: weight of the variance of the stabilities in a batch, which is maximised.
        reconstruction_weight: weight of the reconstruction loss; the authors' code has none.

    Args of the schedule:
        shuffle: whether an epoch takes the images in random order; otherwise in that of the data set.

    Args of the k-means that sets the centres:
        kmeans_restarts: number of restarts, of which the best result is kept.
        kmeans_max_iterations: largest number of iterations of a restart.
        kmeans_tolerance: tolerance of the convergence test of a restart.
    """

    num_views = 1
    has_centres: Tensor
    threshold: Tensor
    cluster_sizes: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        decoder: nn.Module,
        num_clusters: PositiveInt,
        alpha: PositiveFloat,
        threshold_bins: PositiveInt,
        determinacy: Determinacy,
        variance_weight: NonNegativeFloat,
        batch_variance_weight: NonNegativeFloat,
        reconstruction_weight: NonNegativeFloat,
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
            e_step_every_n_epochs=0,  # the centres are set once
        )
        self.decoder = decoder if reconstruction_weight else None
        self.centres = nn.Parameter(torch.zeros(num_clusters, backbone.num_features))  # type: ignore[call-overload]
        self.alpha = alpha
        self.threshold_bins = threshold_bins
        self.determinacy: Determinacy = determinacy
        self.variance_weight = variance_weight
        self.batch_variance_weight = batch_variance_weight
        self.reconstruction_weight = reconstruction_weight
        self.shuffle = shuffle
        self.kmeans_restarts = kmeans_restarts
        self.kmeans_max_iterations = kmeans_max_iterations
        self.kmeans_tolerance = kmeans_tolerance
        self.num_empty_told = 0  # how many empty clusters the last warning named
        self.register_buffer("has_centres", torch.zeros((), dtype=torch.bool))
        self.register_buffer("threshold", torch.zeros(()))  # of the last batch
        self.register_buffer("cluster_sizes", torch.zeros(num_clusters, dtype=torch.int64))  # in this epoch so far

    def start_from(self, earlier: ClusteringMethod) -> None:
        super().start_from(earlier)
        if self.decoder is not None:
            self.load_weights(self.decoder, find_decoder(earlier, autoencoder="conv_autoencoder"))

    # The first centres

    def on_train_start(self) -> None:
        if not self.has_centres:
            self.require_earlier_run("DECS clusters the embeddings", stage="conv_autoencoder")

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if not self.has_centres:
            self.run_e_step(self.current_epoch)
        self.cluster_sizes.zero_()

    @torch.no_grad()
    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """Set the centres by k-means on the embeddings (M, D) of all images."""
        result = kmeans_on_all_ranks(
            features.to(self.weight_dtype),
            num_clusters=self.num_clusters,
            metric="euclidean",
            num_restarts=self.kmeans_restarts,
            max_iterations=self.kmeans_max_iterations,
            tolerance=self.kmeans_tolerance,
            key=key,
        )
        self.centres.copy_(result.centroids)
        self.has_centres.fill_(True)

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        batch.refuse_extra_images("and DECS counts the sizes of the clusters of those that are clustered")
        images = batch.views[0]
        inference_embeddings = self.encode_by_running_statistics(images)
        embeddings = self.backbone(images)
        terms = self.compute_terms(
            distributed.all_gather_with_gradient(embeddings), distributed.all_gather(inference_embeddings)
        )
        if self.decoder is not None:
            weight = self.reconstruction_weight * distributed.global_mean_factor(images)
            terms["reconstruction"] = weight * reconstruction_loss(self.decoder(embeddings), images)
        return terms

    @torch.no_grad()
    def encode_by_running_statistics(self, images: Tensor) -> Tensor:
        """Return embeddings (N, D) of images, normalised as in inference and not by the statistics of the batch."""
        was_training = self.backbone.training
        self.backbone.eval()
        try:
            return self.backbone(images)
        finally:
            self.backbone.train(was_training)

    @replayable()
    def compute_terms(self, embeddings: Tensor, inference_embeddings: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of a whole batch, from embeddings (N, D) in training and in inference mode.

        The threshold is that of the assignments in inference mode, and has no gradient. The threshold and the sizes of
        the clusters are noted in buffers.
        """
        with torch.no_grad():
            q_inference = self.compute_logits(inference_embeddings).softmax(1)
        threshold = otsu_threshold(q_inference, num_bins=self.threshold_bins)
        threshold = threshold.clamp(SMALLEST_THRESHOLD, LARGEST_THRESHOLD).to(q_inference.dtype)
        self.threshold.copy_(threshold)
        self.cluster_sizes += one_hot_mask(q_inference.argmax(1), self.num_clusters).sum(0)
        determinacies = compute_determinacies(
            self.compute_logits(embeddings).softmax(1), threshold, form=self.determinacy
        )
        return self.weigh_terms(compute_stabilities(determinacies, variance_weight=self.variance_weight))

    def compute_logits(self, embeddings: Tensor) -> Tensor:
        """Return the logits (N, K) of the soft assignments of embeddings (N, D) to the centres."""
        return student_logits(embeddings, self.centres, alpha=self.alpha)

    def weigh_terms(self, stabilities: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the stabilities (N,) of a batch."""
        return {
            "instability": 1 - stabilities.mean(),
            "stability_variance": -self.batch_variance_weight * stabilities.var(correction=0),
        }

    def log_terms(self, terms: dict[str, Tensor], loss: Tensor) -> None:
        super().log_terms(terms, loss)
        self.log("train/threshold", self.threshold)

    def on_train_epoch_end(self) -> None:
        shares = self.cluster_sizes / self.cluster_sizes.sum()
        self.log_dict({"train/smallest_cluster": shares.min(), "train/largest_cluster": shares.max()})
        num_empty = int((self.cluster_sizes == 0).sum())
        if num_empty > self.num_empty_told:
            self.num_empty_told = num_empty
            log.warning(
                "%d of %d clusters had no image in epoch %d: the clusters of the auto-encoder collapse. Train it for "
                "longer (before.trainer.max_epochs), or lower method.optimizer.lr",
                *(num_empty, self.num_clusters, self.current_epoch + 1),
            )

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        return self.compute_logits(features) if self.has_centres else None


@torch.no_grad()
def otsu_threshold(probabilities: Tensor, *, num_bins: int) -> Tensor:
    """Return the threshold, a float64 scalar in [0, 1), that best tells small from large `probabilities` (Otsu, 1979).

    Of a histogram with `num_bins` bins on [0, 1] it is the lower edge of the last bin of the small values, for the
    largest variance between the two classes. Among variances that are equal as float32 the lowest threshold wins. It is
    0 where all values lie in one bin.
    """
    # As in the authors' code, float32 values fall into bins. Sums of whole numbers are exact on any device.
    bins = (probabilities.float().double() * num_bins).long().clamp(0, num_bins - 1).flatten()
    counts = torch.zeros(num_bins, dtype=torch.int64, device=bins.device).scatter_add_(0, bins, torch.ones_like(bins))
    numbers = torch.arange(num_bins, device=bins.device)
    share = counts.cumsum(0).double() / bins.numel()
    mean = (counts * numbers).cumsum(0).double() / bins.numel()
    between = (mean[-1] * share - mean).square() / (share * (1 - share) + 1e-6)
    return between.float().argmax().double() / num_bins


def compute_determinacies(probabilities: Tensor, threshold: Tensor, *, form: Determinacy) -> Tensor:
    """Return how far assignments q (N, K) lie from a scalar threshold t, as shares (N, K) of the way to 0 or to 1.

    (t - q) / t below the threshold and (q - t) / (1 - t) from it on, or with the `form` "quadratic" their squares.
    """
    below = (threshold - probabilities) / threshold
    above = (probabilities - threshold) / (1 - threshold)
    shares = torch.where(probabilities < threshold, below, above)
    return shares if form == "linear" else shares.square()


def compute_stabilities(determinacies: Tensor, *, variance_weight: float) -> Tensor:
    """Return the stabilities (N,): the mean of each row of determinacies (N, K) less its weighted biased variance."""
    return determinacies.mean(1) - variance_weight * determinacies.var(1, correction=0)
