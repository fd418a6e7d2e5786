"""Which rows belong to which cluster."""

import torch
from torch import Tensor


def one_hot_mask(labels: Tensor, num_clusters: int) -> Tensor:
    """Whether each row of `labels` (N,) belongs to each cluster (N, K), boolean; a negative label belongs to none.

    Leading dimensions stay: labels (..., N) give (..., N, K). Unlike one_hot it takes two operations, which counts on a
    GPU.
    """
    return labels.unsqueeze(-1) == torch.arange(num_clusters, device=labels.device)
