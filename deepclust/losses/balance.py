"""How uneven soft clusters are: what keeps a cluster head from putting all images into one."""

import math

import torch
from torch import Tensor

from deepclust.engine.precision import full_precision


@full_precision
def entropy_deficit(probabilities: Tensor) -> Tensor:
    """What the entropy of the mean assignment lacks to log K, from probabilities (N, K); a scalar, 0 when balanced.

    log K + sum_k m_k log m_k with 0 log 0 = 0; m are the column sums divided by their total. An empty cluster gets a
    gradient of 0 instead of one without end.
    """
    sizes = probabilities.sum(0)
    shares = sizes / sizes.sum()
    return math.log(len(shares)) + (shares * torch.where(shares > 0, shares, 1.0).log()).sum()


@full_precision
def squared_sizes(probabilities: Tensor) -> Tensor:
    """1/N sum_k (sum_i P_ik)^2 of probabilities (N, K); a scalar, N/K when balanced and N when collapsed.

    It is in proportion to N, so its weight belongs to a batch size (DRC, arXiv 2008.03030).
    """
    return probabilities.sum(0).square().sum() / len(probabilities)
