"""k-means and spherical k-means on the features of a fixed network, the baseline of all methods.

Lloyd's algorithm runs over the features of all images as the E-step, so that no training is needed
(`trainer.max_epochs=0`). With epochs, the centroids also follow the gradient of the same objective over batches between
two E-steps. Spherical k-means (Dhillon and Modha, Machine Learning 42, 2001) is `metric: cosine`.

Logged term: `train/inertia`, the mean over the batch of the squared distance (or cosine distance) to the nearest
centroid.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from deepclust.clustering.kmeans_distances import Metric, centroid_logits, squared_distances
from deepclust.engine import distributed
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule
from deepclust.number_types import NonNegativeFloat, PositiveInt


class KMeans(ClusteringMethod):
    """k-means on the features of a network that is not trained.

    Args (`backbone`, `num_clusters`, `optimizer`, `schedule`: see `ClusteringMethod`):
        metric: `euclidean` for k-means, `cosine` for spherical k-means.
        restarts: the number of initialisations, of which the best result is kept.
        max_iterations: the largest number of Lloyd iterations of a restart.
        tolerance: a restart stops when the centroids move by no more than this times the variance of the features.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: PositiveInt,
        metric: Metric,
        restarts: PositiveInt,
        max_iterations: PositiveInt,
        tolerance: NonNegativeFloat,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
    ) -> None:
        super().__init__(
            backbone=backbone.requires_grad_(False),
            num_clusters=num_clusters,
            optimizer=optimizer,
            schedule=schedule,
            e_step_every_n_epochs=1,
        )
        self.metric = metric
        self.restarts = restarts
        self.max_iterations = max_iterations
        self.tolerance = tolerance
        self.centroids = nn.Parameter(torch.zeros(num_clusters, backbone.num_features))  # type: ignore[call-overload]

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        features = self.encode(batch.views[0])
        inertia = self.distances_to_centroids(features).amin(1).mean()
        return {"inertia": distributed.global_mean_factor(features) * inertia}

    def encode(self, images: Tensor) -> Tensor:
        self.backbone.eval()
        return self.backbone(images)

    def cluster_logits(self, features: Tensor) -> Tensor:
        return centroid_logits(features, self.centroids, metric=self.metric)

    def distances_to_centroids(self, features: Tensor) -> Tensor:
        """Return the squared Euclidean or the cosine distances (N, K) of features (N, D) to the centroids."""
        if self.metric == "cosine":
            return 1 - normalize(features, dim=1) @ normalize(self.centroids, dim=1).T
        return squared_distances(features, self.centroids)

    @torch.no_grad()
    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        result = kmeans_on_all_ranks(
            features,
            num_clusters=self.num_clusters,
            metric=self.metric,
            num_restarts=self.restarts,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
            key=key,
        )
        self.centroids.copy_(result.centroids)
