"""The statistics of clusters as weighted sets of features: how large they are, where they lie and how wide they are."""

from typing import NamedTuple

import torch
from torch import Tensor

from deepclust.engine.precision import full_precision


class ClusterStatistics(NamedTuple):
    """Size, mean and variance of K clusters of features with D numbers."""

    sizes: Tensor  # (K,), sums of the assignments
    means: Tensor  # (K, D), 0 where the size is 0
    variances: Tensor  # (K, D), of each number by itself, above 0


@full_precision
def pool_statistics(features: Tensor, assignments: Tensor, *, variance_floor: float) -> ClusterStatistics:
    """Return the statistics of the clusters of features (N, D), by soft or one-hot assignments (N, K).

    Variances are biased, and `variance_floor` is added to them: that is the variance of a cluster with a single image,
    and of an empty one.
    """
    sizes = assignments.sum(0)
    shares = assignments / torch.where(sizes > 0, sizes, 1)
    means = shares.T @ features
    # One cluster at a time: differences from all means at once would take K times the memory of the features.
    variances = [column @ (features - mean).square() for column, mean in zip(shares.unbind(1), means, strict=True)]
    return ClusterStatistics(sizes, means, torch.stack(variances) + variance_floor)


def average_statistics(earlier: ClusterStatistics, later: ClusterStatistics, *, decay: float) -> ClusterStatistics:
    """Return `decay` times the earlier statistics plus 1 - `decay` times the later ones, each number by itself."""
    return ClusterStatistics(*(decay * a + (1 - decay) * b for a, b in zip(earlier, later, strict=True)))
