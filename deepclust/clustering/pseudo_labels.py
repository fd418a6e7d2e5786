"""Pseudo-labels of the training images by spherical k-means: the E-step of ProPos and DigPro."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks


class PseudoLabels(nn.Module):
    """Assignments (num_images,) and centroids (K, D) of the last spherical k-means; all zero before the first.

    `restarts` is the number of restarts; for `max_iterations` and `tolerance` see `clustering.kmeans.kmeans`.
    """

    assignments: Tensor
    centroids: Tensor

    def __init__(
        self,
        *,
        num_images: int,
        num_clusters: int,
        num_features: int,
        restarts: int,
        max_iterations: int,
        tolerance: float,
    ) -> None:
        super().__init__()
        self.restarts = restarts
        self.max_iterations = max_iterations
        self.tolerance = tolerance
        self.register_buffer("assignments", torch.zeros(num_images, dtype=torch.int64))
        self.register_buffer("centroids", torch.zeros(num_clusters, num_features))

    def update(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """Cluster the features (num_images, D), which are the same on every process; so is the result."""
        result = kmeans_on_all_ranks(
            features,
            num_clusters=len(self.centroids),
            metric="cosine",
            num_restarts=self.restarts,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
            key=key,
        )
        self.assignments.copy_(result.assignments)
        self.centroids.copy_(result.centroids)

    def logits(self, features: Tensor, *, temperature: float) -> Tensor:
        """Return logits (N, K): the cosines of features (N, D) with the centroids, divided by `temperature`."""
        return normalize(features, dim=1) @ normalize(self.centroids, dim=1).T / temperature
