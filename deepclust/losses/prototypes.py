"""Prototypes of the clusters in a batch, and the loss that scatters them (ProPos, arXiv 2111.11821; also in DigPro)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.engine.precision import full_precision
from deepclust.nn.one_hot import one_hot_mask

ABSENT_LOGIT = -10.0  # of absent clusters, after division by the temperature, as in the authors' code


def batch_prototypes(embeddings: Tensor, assignments: Tensor, num_clusters: int) -> Tensor:
    """Return unit prototypes (K, D): normalised means of the normalised `embeddings` (N, D) of each cluster.

    `assignments` (N,) are cluster ids; rows with a negative id belong to no cluster. The prototype of a cluster that is
    absent from the batch is zero.
    """
    members = one_hot_mask(assignments, num_clusters).to(embeddings.dtype)
    means = members.T @ F.normalize(embeddings, dim=1) / members.sum(0).clamp(min=1).unsqueeze(1)
    return F.normalize(means, dim=1)


@full_precision
def prototype_scattering(online: Tensor, target: Tensor, present: Tensor, *, temperature: float) -> Tensor:
    """Return the loss that pulls online prototypes (K, D) to the target ones and away from each other; a scalar.

    A are the clusters that are `present` (K,) in the batch. With z_cc = m_c . m'_c / t and z_cd = m_c . m_d / t, the
    loss is the mean over c in A of
    -z_cc + log( sum over d in A of exp z_cd  +  (K - |A|) exp(-10) ); 0 if A is empty. The gradient reaches `online`
    only.
    """
    logits = online @ online.T / temperature
    positives = (online * target.detach()).sum(1) / temperature
    logits = torch.where(torch.eye(len(online), dtype=torch.bool, device=online.device), positives, logits)
    logits = logits.masked_fill(~present, ABSENT_LOGIT)
    losses = logits.logsumexp(1) - positives
    return torch.where(present, losses, 0.0).sum() / present.sum().clamp(min=1)


@full_precision
def prototype_scattering_loss(
    q: Tensor, k: Tensor, assignments: Tensor, num_clusters: int, *, temperature: float
) -> Tensor:
    """Return the scattering loss of the prototypes of online and target embeddings q and k (N, D); a scalar."""
    present = one_hot_mask(assignments, num_clusters).any(0)
    online = batch_prototypes(q, assignments, num_clusters)
    target = batch_prototypes(k, assignments, num_clusters)
    return prototype_scattering(online, target, present, temperature=temperature)
