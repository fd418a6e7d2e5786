"""Rules from features to clusters: a method's own logits or the nearest centroid, with the confidence of each image."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepclust.clustering.kmeans_distances import centroid_logits, float64_chunk_size
from deepclust.errors import InputError

CHUNK_SIZE = 65536  # rows of features that are assigned at a time
MAX_LOGITS = 2**25  # that are in memory at a time: of more than 512 clusters, fewer rows are


def assign_by_own_rule(
    cluster_logits: Callable[[Tensor], Tensor | None], features: Tensor, *, num_clusters: int
) -> tuple[Tensor, Tensor] | None:
    """Return assignments (M,) and confidence (M,) of features (M, D) by a method's own rule; None if it has none.

    `cluster_logits` is the method's function of that name, and `num_clusters` the number K of its logits. The
    confidence of an assignment is its probability.

    Raises:
        InputError: if the logits of an image give no probabilities.
    """
    assignments, confidence = [], []
    with torch.no_grad():
        for chunk in features.split(min(CHUNK_SIZE, max(MAX_LOGITS // num_clusters, 1))):
            logits = cluster_logits(chunk)
            if logits is None:
                return None
            assignments.append(logits.argmax(1))
            confidence.append(logits.softmax(1).amax(1))
    return torch.cat(assignments), require_probabilities(torch.cat(confidence))


def require_probabilities(confidence: Tensor) -> Tensor:
    """Return confidence (M,) as it is.

    Raises:
        InputError: if it is no number for some image.
    """
    if num_bad := int(confidence.isnan().sum()):
        raise InputError(
            f"the logits of {num_bad} of {len(confidence)} images are NaN or too large to give probabilities",
            expected="logits whose softmax is a number",
            do="look at cluster_logits of the method, and at the weights that it uses",
        )
    return confidence


def assign_to_centroids(features: Tensor, centroids: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return assignments (M,) and confidence (M,) of features (M, D) by the nearest of centroids (K, D).

    The confidence is the posterior probability of the cluster under equal Gaussians at the centroids: the largest
    softmax of minus squared distance over 2 `scale`. `scale` is the `mean_squared_distance` of the features that the
    centroids were fitted to.

    Raises:
        InputError: if the distances of a row give no probabilities.
    """
    assignments, confidence = [], []
    for chunk in features.split(float64_chunk_size(features.device)):
        logits = centroid_logits(chunk, centroids, metric="euclidean")
        assignments.append(logits.argmax(1))
        confidence.append((logits / (2 * scale)).softmax(1).amax(1))
    return torch.cat(assignments), require_probabilities(torch.cat(confidence))


def cluster_means(features: Tensor, assignments: Tensor, num_clusters: int) -> Tensor:
    """Return the mean features (K, D) of the clusters of features (M, D); nan where a cluster is empty."""
    sums = features.new_zeros(num_clusters, features.shape[1], dtype=torch.float64)
    size = float64_chunk_size(features.device)
    for rows, clusters in zip(features.split(size), assignments.split(size), strict=True):
        sums.index_add_(0, clusters, rows.double())
    return (sums / torch.bincount(assignments, minlength=num_clusters)[:, None]).to(features)


def mean_squared_distance(features: Tensor, centroids: Tensor, assignments: Tensor) -> Tensor:
    """Return the mean squared distance of features (M, D) to their clusters' centroids (K, D), a scalar above 0."""
    chunks = zip(features.split(CHUNK_SIZE), assignments.split(CHUNK_SIZE), strict=True)
    total = torch.stack([(rows - centroids[clusters]).square().sum() for rows, clusters in chunks]).sum()
    return (total / len(features)).clamp(min=1e-12)
