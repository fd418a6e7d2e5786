"""Cluster discrimination: classification into the clusters that an earlier epoch assigned.

Used by CoKe (arXiv 2105.11527) and SeCu (arXiv 2311.14310).
"""

import torch.nn.functional as F
from torch import Tensor


def mix_with_other_view(pseudo_labels: Tensor, logits: Tensor, *, label_weight: float) -> Tensor:
    """Return targets (2, N, K) of two views: pseudo-labels mixed with what the other view predicts; no gradient.

    `pseudo_labels` (N, K) are distributions, and `label_weight` is their weight. The rest of the weight is on the
    softmax of the other view's `logits` (2, N, K).
    """
    return label_weight * pseudo_labels + (1 - label_weight) * logits.detach().softmax(2).flip(0)


def cross_entropy_per_row(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy (V, N) of each row of `logits` (V, N, K) with the distributions `targets` (V, N, K)."""
    rows = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none")
    return rows.unflatten(0, logits.shape[:2])
