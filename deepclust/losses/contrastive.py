"""InfoNCE between two views: over images (rows) or, with transposed assignments, over clusters.

The rows are not normalised here: a caller that wants cosines normalises them first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.engine.precision import full_precision


@full_precision
def info_nce(anchors: Tensor, others: Tensor, *, temperature: float) -> Tensor:
    """Return InfoNCE of `anchors` (N, D) against `others` (N, D), in one direction; a scalar, 0 for one row.

    -1/N sum_i log( exp(a_i . b_i / t) / sum_j exp(a_i . b_j / t) ): row i of the others is the positive of anchor i,
    the other rows are its negatives. Anchors are not compared with each other (DRC, arXiv 2008.03030).
    """
    logits = anchors @ others.T / temperature
    return F.cross_entropy(logits, torch.arange(len(anchors), device=anchors.device))


@full_precision
def nt_xent(a: Tensor, b: Tensor, *, temperature: float) -> Tensor:
    """Return NT-Xent, InfoNCE among the 2N rows of views a and b, both (N, D); a scalar, 0 for one row.

    1/2N sum_i [ -r_i . r_p(i) / t + log sum_{j != i} exp(r_i . r_j / t) ] with p(i) the same row in the other view. The
    negatives come from both views, and no row is compared with itself (SimCLR, arXiv 2002.05709, equation 1; CC).
    """
    rows = torch.cat([a, b])
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logits = (rows @ rows.T / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(rows), device=rows.device).roll(len(a)))
