"""Soft assignments by Student's t-distribution and the target that sharpens them, as DEC has them.

Xie, Girshick and Farhadi (ICML 2016, arXiv 1511.06335), after t-SNE (van der Maaten and Hinton, JMLR 2008).
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from deepclust.clustering.kmeans_distances import squared_distances
from deepclust.engine.precision import full_precision


@full_precision
def student_logits(embeddings: Tensor, centres: Tensor, *, alpha: float) -> Tensor:
    """Return logits (N, K) of the soft assignments q of embeddings (N, D) to centres (K, D); q is their softmax.

    q_ij is proportional to (1 + |z_i - c_j|^2 / a)^(-(a + 1) / 2), where a are the degrees of freedom `alpha`. By their
    logarithm, assignments to centres that are far away stay above 0.
    """
    return -(alpha + 1) / 2 * torch.log1p(squared_distances(embeddings, centres) / alpha)


def target_distribution(q: Tensor) -> Tensor:
    """Return the sharpened form p (N, K) of assignments q (N, K), proportional to q^2 / cluster size in these rows.

    A cluster whose column sums to 0 gets 0.
    """
    sizes = q.sum(0)
    weights = q.square() / torch.where(sizes > 0, sizes, 1)
    return weights / weights.sum(1, keepdim=True)


@full_precision
def target_divergence(targets: Tensor, logits: Tensor) -> Tensor:
    """Return the mean over the rows of KL(p || q), a scalar, of targets p (N, K) and the logits (N, K) of q.

    The targets get no gradient.
    """
    targets = targets.detach()
    return (torch.xlogy(targets, targets) - targets * log_softmax(logits, 1)).sum(1).mean()
