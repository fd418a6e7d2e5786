"""Losses that grow with uneven cluster sizes; they keep a cluster head from putting all images into one cluster."""

import math

import torch
from torch import Tensor

from deepclust.engine.precision import full_precision


@full_precision
def cluster_size_entropy_deficit(probabilities: Tensor) -> Tensor:
    """Return by how much the entropy of the mean of `probabilities` (N, K) falls short of log K; a scalar.

    log K + sum_k m_k log m_k with 0 log 0 = 0, where m are the column sums divided by their total: the KL divergence of
    the cluster sizes from equal ones, 0 when balanced and log K when collapsed. An empty cluster gets a gradient of 0
    instead of an infinite one.
    """
    sizes = probabilities.sum(0)
    shares = sizes / sizes.sum()
    return math.log(len(shares)) + (shares * torch.where(shares > 0, shares, 1.0).log()).sum()


@full_precision
def squared_cluster_sizes(probabilities: Tensor) -> Tensor:
    """Return 1/N sum_k (sum_i P_ik)^2 of `probabilities` P (N, K); a scalar, N/K when balanced and N when collapsed.

    The value is proportional to N, so that its weight holds for one batch size only (DRC, arXiv 2008.03030).
    """
    return probabilities.sum(0).square().sum() / len(probabilities)
