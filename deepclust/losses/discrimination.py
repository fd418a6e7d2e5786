"""Classifying images into remembered clusters (CoKe, arXiv 2105.11527; SeCu, arXiv 2311.14310)."""

import torch.nn.functional as F
from torch import Tensor


def mixed_targets(labels: Tensor, logits: Tensor, *, label_weight: float) -> Tensor:
    """Targets (2, N, K) of two views: `label_weight` on the label, the rest on what the other view says; no gradient.

    labels (N, K) are distributions, logits (2, N, K) those of the two views.
    """
    return label_weight * labels + (1 - label_weight) * logits.detach().softmax(2).flip(0)


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row (V, N) of logits and targets (V, N, K), distributions."""
    rows = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none")
    return rows.unflatten(0, logits.shape[:2])
