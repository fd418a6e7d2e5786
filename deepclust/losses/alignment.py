"""What online predictions are aligned with (BYOL, arXiv 2006.07733; also in ProPos and DigPro)."""

import torch.nn.functional as F
from torch import Tensor

from deepclust.engine.precision import full_precision


@full_precision
def alignment(prediction: Tensor, target: Tensor) -> Tensor:
    """BYOL's loss without its constant: -2 times the mean cosine of the rows of two (N, D) tensors."""
    return -2 * F.cosine_similarity(prediction, target.detach(), dim=1, eps=1e-8).mean()
