"""Which images lie so clearly in their clusters that a network may learn these as labels, by fuzzy memberships."""

import math
from typing import Literal

import torch
from torch import Tensor

from deepclust.clustering.kmeans_distances import squared_distances
from deepclust.engine.precision import full_precision

Certainty = Literal["entropy", "margin"]


@full_precision
def fuzzy_memberships(embeddings: Tensor, centres: Tensor, *, fuzzifier: float) -> Tensor:
    """Return the memberships u (N, K) of embeddings (N, D) in centres (K, D), as fuzzy c-means has them (Bezdek, 1981).

    u_ij = 1 / sum_l (|z_i - c_j|^2 / |z_i - c_l|^2)^(1 / (m - 1)), with the exponent m > 1, the `fuzzifier`. An
    embedding that lies on a centre belongs to it alone, or in equal parts to all centres that lie there.
    """
    distances = squared_distances(embeddings, centres)
    is_on_centre = distances == 0
    memberships = (-distances.log() / (fuzzifier - 1)).softmax(1)
    shared = is_on_centre / is_on_centre.sum(1, keepdim=True).clamp(min=1)
    return torch.where(is_on_centre.any(1, keepdim=True), shared.to(memberships.dtype), memberships)


def measure_certainty(memberships: Tensor, *, by: Certainty) -> Tensor:
    """Return how certain (N,) memberships u (N, K) are, from 0, where all are alike, to 1, where one is all.

    By "entropy", 1 + sum_j u_ij log u_ij / log K; by "margin", the largest u_ij less the second largest. A single
    cluster is certain.
    """
    num_clusters = memberships.shape[1]
    if num_clusters == 1:
        return torch.ones_like(memberships[:, 0])
    if by == "margin":
        largest, second = memberships.topk(2).values.unbind(1)
        return largest - second
    return 1 + torch.xlogy(memberships, memberships).sum(1) / math.log(num_clusters)


def select_reliable(assignments: Tensor, certainty: Tensor, *, share: float, least: int, num_clusters: int) -> Tensor:
    """Return which rows (M,) are reliable: of each cluster the most certain, by assignments and certainties (M,).

    They are a `share` of the cluster, rounded down, but at least `least` of its rows, and at most as many as the median
    of the sizes of all clusters that have rows. Of equally certain rows the first ones are taken.
    """
    sizes = torch.bincount(assignments, minlength=num_clusters)
    median = torch.quantile(sizes[sizes > 0].double(), 0.5).floor()
    numbers = (share * sizes.double()).floor().clamp(min=least).minimum(median).minimum(sizes.double())
    # The rows by cluster, and within a cluster by certainty; then each row's place in its cluster, counted from 0
    order = certainty.argsort(descending=True, stable=True)
    order = order[assignments[order].argsort(stable=True)]
    clusters = assignments[order]
    places = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[clusters]
    return torch.empty_like(assignments, dtype=torch.bool).scatter_(0, order, places < numbers[clusters])
