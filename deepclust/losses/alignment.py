"""BYOL's loss, which aligns online predictions with target embeddings (arXiv 2006.07733)."""

import torch.nn.functional as F
from torch import Tensor

from deepclust.engine.precision import full_precision


@full_precision
def alignment_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return -2 times the mean cosine of the rows of two (N, D) tensors: BYOL's loss without its constant 2.

    The gradient reaches `prediction` only.
    """
    return -2 * F.cosine_similarity(prediction, target.detach(), dim=1, eps=1e-8).mean()
