"""Online assignment that keeps clusters from running empty: the dual update of CoKe and SeCu, and SeCu's entropy rule.

Images are assigned batch by batch. A plain arg max of the similarities would soon put them all into a few clusters, so
each constraint adds a term that makes small clusters more attractive:

SizeConstraint      dual variables, which `update_duals` raises for clusters below a lower bound on their size
EntropyConstraint   a cost of every move that makes the cluster sizes less even
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from deepclust.nn.one_hot import one_hot_mask


class BalanceConstraint(Protocol):
    """How images are assigned, and the state that this needs.

    Where all processes call `update` with the images of the global batch, their states stay equal.
    """

    counts: Tensor  # (K,) images in each cluster

    def assign(self, similarities: Tensor, previous: Tensor | None) -> Tensor:
        """Return the clusters (N,) of images with `similarities` (N, K); on ties the lowest id.

        `previous` (N,) is the cluster that each image is counted in, -1 for none. It is None in the first epoch, when
        no image is counted yet.
        """
        ...

    def update(self, assignments: Tensor, previous: Tensor | None) -> None:
        """Take in the `assignments` (N,) of the global batch, in which no image appears twice."""
        ...

    def end_epoch(self) -> None:
        """Prepare the state for the next epoch."""
        ...


class SizeConstraint(nn.Module):
    """A lower bound on the share of images in every cluster, enforced by one dual variable per cluster.

    An image goes to arg max_k (similarity_k + dual_k). The bound is `min_share` / K, and `step` is the step size of the
    dual update. The duals last over epochs; the counts are those of the current epoch. (CoKe, arXiv 2105.11527; SeCu,
    arXiv 2311.14310.)
    """

    duals: Tensor
    counts: Tensor

    def __init__(self, *, num_clusters: int, step: float, min_share: float) -> None:
        super().__init__()
        self.step = step
        self.min_share = min_share
        self.register_buffer("duals", torch.zeros(num_clusters))
        self.register_buffer("counts", torch.zeros(num_clusters))

    def assign(self, similarities: Tensor, previous: Tensor | None) -> Tensor:
        return (similarities + self.duals).argmax(1)

    @torch.no_grad()
    def update(self, assignments: Tensor, previous: Tensor | None) -> None:
        sizes = cluster_sizes(assignments, self.counts)
        self.update_duals(sizes, len(assignments))
        self.counts += sizes

    @torch.no_grad()
    def update_duals(self, sizes: Tensor, batch_size: int) -> None:
        """Do the dual update: raise the duals of clusters below the bound, lower those of clusters above it.

        After a batch of N images, n_k of them in cluster k (`sizes` (K,)), dual_k moves by
        step (min_share / K - n_k / N). It stays at or above 0, unless `min_share` is 1: then all clusters are to have
        the same size, and duals may have either sign.
        """
        # In the authors' order of operations, so that duals which should be equal or 0 are as near to it as theirs.
        self.duals -= self.step / batch_size * sizes
        self.duals += self.step * (self.min_share / len(sizes))
        if self.min_share < 1:
            self.duals.clamp_(min=0)

    def end_epoch(self) -> None:
        self.counts.zero_()


class EntropyConstraint(nn.Module):
    """A pull towards equal sizes: an assignment costs `weight` times the change that it makes to sum_k p_k log p_k.

    p_k is the share of cluster k among all images counted so far, each in the cluster that it last went to. In the
    first epoch an image joins a cluster. Later it moves there from the cluster that it is counted in, and staying costs
    nothing. All images of a batch are weighed against the counts before the batch. (SeCu, arXiv 2311.14310.)
    """

    counts: Tensor

    def __init__(self, *, num_clusters: int, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("counts", torch.zeros(num_clusters))

    def assign(self, similarities: Tensor, previous: Tensor | None) -> Tensor:
        total = self.counts.sum()
        if previous is None:
            return (similarities - self.weight * cost_of_joining(self.counts, total + 1)).argmax(1)
        is_counted, previous = previous >= 0, previous.clamp(min=0)
        joining = cost_of_joining(self.counts, total)
        leaving = torch.where(self.counts > 0, -cost_of_joining(self.counts - 1, total), 0.0)
        cost = joining + torch.where(is_counted, leaving[previous], 0.0).unsqueeze(1)
        stays = is_counted.unsqueeze(1) & one_hot_mask(previous, len(joining))
        return (similarities - self.weight * cost.masked_fill(stays, 0.0)).argmax(1)

    @torch.no_grad()
    def update(self, assignments: Tensor, previous: Tensor | None) -> None:
        self.counts += cluster_sizes(assignments, self.counts)
        if previous is not None:
            self.counts -= cluster_sizes(previous.clamp(min=0), self.counts, mask=previous >= 0)

    def end_epoch(self) -> None: ...


def cluster_sizes(assignments: Tensor, like: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return how many of `assignments` (N,) name each cluster, with the shape (K,) and dtype of `like`.

    Only those are counted for which `mask` (N,), if given, is true. Unlike torch.bincount it does not wait for a GPU.
    """
    ones = torch.ones_like(assignments) if mask is None else mask
    return torch.zeros_like(like).scatter_add_(0, assignments, ones.to(like.dtype))


def cost_of_joining(counts: Tensor, total: Tensor) -> Tensor:
    """Return by how much p log p, p = counts / total (K,), rises where one more image joins a cluster.

    With n = counts and M = total, ((n + 1) / M) log((n + 1) / M) - (n / M) log(n / M) is computed as
    (log((n + 1) / M) + n log(1 + 1 / n)) / M, which subtracts no nearly equal numbers; n log(1 + 1 / n) is 0 for n = 0.
    """
    growth = torch.where(counts > 0, counts * torch.log1p(1 / counts.clamp(min=1)), 0.0)
    return (((counts + 1).clamp(min=1) / total).log() + growth) / total
