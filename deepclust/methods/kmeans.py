"""k-means and spherical k-means on the features of a network that stays as it is: what every method is measured by."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.distributed_kmeans import dealt_kmeans
from deepclust.clustering.kmeans import Metric
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule


class KMeans(ClusteringMethod):
    """Lloyd's algorithm over the features of all images, as the E-step; no epoch of gradient steps is needed.

    With epochs, the centroids descend the same objective over batches between two E-steps. Spherical k-means is
    `metric: cosine` (Dhillon and Modha, Machine Learning 42, 2001). Logged term: inertia, the mean squared distance
    (or cosine distance) to the nearest centroid.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: int,
        metric: Metric,
        restarts: int,
        max_iterations: int,
        tolerance: float,
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
        return {"inertia": self.distances(self.encode(batch.views[0])).amin(1).mean()}

    def encode(self, images: Tensor) -> Tensor:
        self.backbone.eval()
        return self.backbone(images)

    def cluster_logits(self, features: Tensor) -> Tensor:
        return -self.distances(features)

    def distances(self, features: Tensor) -> Tensor:
        """Squared or cosine distances (N, K) of features (N, D) to the centroids."""
        if self.metric == "cosine":
            return 1 - normalize(features, dim=1) @ normalize(self.centroids, dim=1).T
        return torch.cdist(features, self.centroids).square()

    @torch.no_grad()
    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        fitted = dealt_kmeans(
            features,
            num_clusters=self.num_clusters,
            metric=self.metric,
            num_restarts=self.restarts,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
            key=key,
        )
        self.centroids.copy_(fitted.centroids)
