"""Cluster membership of rows as a boolean one-hot matrix."""

import torch
from torch import Tensor


def one_hot_mask(assignments: Tensor, num_clusters: int) -> Tensor:
    """Return whether each row belongs to each cluster, boolean (N, K), by `assignments` (N,); negative ones to none.

    Leading dimensions stay: assignments (..., N) give (..., N, K). This takes two operations, fewer than
    torch.nn.functional.one_hot, which counts on a GPU.
    """
    return assignments.unsqueeze(-1) == torch.arange(num_clusters, device=assignments.device)
