"""Prototypes of a batch, and the loss that scatters them (ProPos, arXiv 2111.11821; also in DigPro)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.engine.precision import full_precision
from deepclust.nn.one_hot import one_hot_mask

ABSENT_LOGIT = -10.0  # the authors' code fills the columns of absent clusters with this, after the temperature


def batch_prototypes(embeddings: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    """Unit prototypes (K, D): normalised means of the normalised rows of `embeddings` (N, D); zero where absent.

    `labels` (N,) are cluster ids; rows with a negative id belong to no prototype.
    """
    members = one_hot_mask(labels, num_clusters).to(embeddings.dtype)
    means = members.T @ F.normalize(embeddings, dim=1) / members.sum(0).clamp(min=1).unsqueeze(1)
    return F.normalize(means, dim=1)


@full_precision
def prototype_scattering(online: Tensor, target: Tensor, present: Tensor, *, temperature: float) -> Tensor:
    """Pull each online prototype (K, D) to its target prototype and push it from the other online ones; a scalar.

    For the present clusters A, with z_cc = m_c . m'_c / t and z_cd = m_c . m_d / t, the mean over c in A of
    -z_cc + log( sum over d in A of exp z_cd  +  (K - |A|) exp(-10) ). `present` (K,) is boolean. No cluster present:
    zero. The gradient reaches `online` only.
    """
    logits = online @ online.T / temperature
    positives = (online * target.detach()).sum(1) / temperature
    logits = torch.where(torch.eye(len(online), dtype=torch.bool, device=online.device), positives, logits)
    logits = logits.masked_fill(~present, ABSENT_LOGIT)
    losses = logits.logsumexp(1) - positives
    return torch.where(present, losses, 0.0).sum() / present.sum().clamp(min=1)


@full_precision
def prototype_scattering_loss(q: Tensor, k: Tensor, labels: Tensor, num_clusters: int, *, temperature: float) -> Tensor:
    """Prototype scattering of raw online rows q (N, D) against target rows k (N, D) with `labels` (N,); a scalar."""
    present = one_hot_mask(labels, num_clusters).any(0)
    online = batch_prototypes(q, labels, num_clusters)
    target = batch_prototypes(k, labels, num_clusters)
    return prototype_scattering(online, target, present, temperature=temperature)
