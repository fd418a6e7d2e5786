"""Soft assignments to clusters of equal size, by Sinkhorn's iterations (Cuturi, NIPS 2013)."""

import math

import torch
from torch import Tensor

from deepclust.engine.precision import full_precision


@full_precision
def sinkhorn_assignments(scores: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Return soft assignments (N, K) by `scores` (N, K), the larger the likelier; rows sum to 1, columns to about N/K.

    The softmax of scores / epsilon is scaled by columns and by rows in turn, in logarithms, so that scores of any size
    give numbers. The smaller `epsilon`, the harder the assignments, and the more `iterations` they need.
    """
    logs = (scores / epsilon).log_softmax(1)
    for _ in range(iterations):
        logs = logs - torch.logsumexp(logs, 0) + math.log(len(logs) / logs.shape[1])
        logs = logs.log_softmax(1)
    return logs.exp()
