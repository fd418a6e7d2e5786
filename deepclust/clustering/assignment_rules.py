"""Rules from features to clusters: a method's own logits or the nearest centroid, with the confidence of each image."""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_SIZE = 65536  # rows of features that are assigned at a time


def assign_by_own_rule(
    cluster_logits: Callable[[Tensor], Tensor | None], features: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return assignments (M,) and confidence (M,) of features (M, D) by a method's own rule; None if it has none.

    `cluster_logits` is the method's function of that name. The confidence of an assignment is its probability.
    """
    assignments, confidence = [], []
    with torch.no_grad():
        for chunk in features.split(CHUNK_SIZE):
            logits = cluster_logits(chunk)
            if logits is None:
                return None
            assignments.append(logits.argmax(1))
            confidence.append(logits.softmax(1).amax(1))
    return torch.cat(assignments), torch.cat(confidence)


def assign_to_centroids(features: Tensor, centroids: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return assignments (M,) and confidence (M,) of features (M, D) by the nearest of centroids (K, D).

    The confidence is the posterior probability of the cluster under equal Gaussians at the centroids: the largest
    softmax of minus squared distance over 2 `scale`. `scale` is the `mean_squared_distance` of the features that the
    centroids were fitted to.
    """
    parts = [
        (-torch.cdist(chunk, centroids).square() / (2 * scale)).softmax(1).max(1)
        for chunk in features.split(CHUNK_SIZE)
    ]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def cluster_means(features: Tensor, assignments: Tensor, num_clusters: int) -> Tensor:
    """Return the mean features (K, D) of the clusters of features (M, D); nan where a cluster is empty."""
    sums = features.new_zeros(num_clusters, features.shape[1]).index_add_(0, assignments, features)
    return sums / torch.bincount(assignments, minlength=num_clusters)[:, None]


def mean_squared_distance(features: Tensor, centroids: Tensor, assignments: Tensor) -> Tensor:
    """Return the mean squared distance of features (M, D) to their clusters' centroids (K, D), a scalar above 0."""
    chunks = zip(features.split(CHUNK_SIZE), assignments.split(CHUNK_SIZE), strict=True)
    total = torch.stack([(rows - centroids[clusters]).square().sum() for rows, clusters in chunks]).sum()
    return (total / len(features)).clamp(min=1e-12)
