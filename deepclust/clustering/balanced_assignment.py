"""Online assignment under a balance rule: rows go to clusters batch by batch, and none runs empty (SeCu, CoKe)."""

from typing import Protocol

import torch
from torch import Tensor, nn

from deepclust.nn.one_hot import one_hot_mask


class Balance(Protocol):
    """How rows are assigned, and what is remembered of it; alike on all processes if updated with gathered rows."""

    counts: Tensor  # (K,) rows in each cluster

    def assign(self, similarity: Tensor, previous: Tensor | None) -> Tensor:
        """Clusters (N,) of rows with similarities (N, K); ties go to the first.

        `previous` (N,): the cluster each row is counted in, -1 for none; None in the first epoch, where none is.
        """
        ...

    def update(self, labels: Tensor, previous: Tensor | None) -> None:
        """Take note that the rows of the global batch, of which each is another image, went to `labels` (N,)."""
        ...

    def end_epoch(self) -> None:
        """What an epoch leaves to the next."""
        ...


class SizeBalance(nn.Module):
    """The nearest cluster under a lower bound on every cluster's share, kept by one dual variable a cluster.

    A row goes to arg max_k (similarity_k + dual_k). After a batch of N rows, n_k of them in k, dual_k moves by `step`
    (`min_share` / K - n_k / N) and stays at or above 0, unless `min_share` is 1: equal sizes, either sign. Duals
    last; counts are those of the epoch. (CoKe, arXiv 2105.11527; SeCu, arXiv 2311.14310.)
    """

    duals: Tensor
    counts: Tensor

    def __init__(self, *, num_clusters: int, step: float, min_share: float) -> None:
        super().__init__()
        self.step = step
        self.min_share = min_share
        self.register_buffer("duals", torch.zeros(num_clusters))
        self.register_buffer("counts", torch.zeros(num_clusters))

    def assign(self, similarity: Tensor, previous: Tensor | None) -> Tensor:
        return (similarity + self.duals).argmax(1)

    @torch.no_grad()
    def update(self, labels: Tensor, previous: Tensor | None) -> None:
        members = sizes(labels, self.counts)
        # In the authors' order of operations, so that duals which should be equal or 0 are as near to it as theirs.
        self.duals -= self.step / len(labels) * members
        self.duals += self.step * (self.min_share / len(members))
        if self.min_share < 1:
            self.duals.clamp_(min=0)
        self.counts += members

    def end_epoch(self) -> None:
        self.counts.zero_()


class EntropyBalance(nn.Module):
    """The nearest cluster with a pull to equal sizes: a cost `weight` times the change of sum_k p_k log p_k.

    p are the shares of all rows counted so far, each in the cluster it last went to. In the first epoch a row joins;
    later it moves there from the cluster that it is counted in, and staying costs nothing. All rows of a batch are
    weighed against the counts before it. (SeCu, arXiv 2311.14310.)
    """

    counts: Tensor

    def __init__(self, *, num_clusters: int, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("counts", torch.zeros(num_clusters))

    def assign(self, similarity: Tensor, previous: Tensor | None) -> Tensor:
        total = self.counts.sum()
        if previous is None:
            return (similarity - self.weight * joining(self.counts, total + 1)).argmax(1)
        counted, at = previous >= 0, previous.clamp(min=0)
        joins = joining(self.counts, total)
        leaves = torch.where(self.counts > 0, -joining(self.counts - 1, total), 0.0)
        change = joins + torch.where(counted, leaves[at], 0.0).unsqueeze(1)
        stays = counted.unsqueeze(1) & one_hot_mask(at, len(joins))
        return (similarity - self.weight * change.masked_fill(stays, 0.0)).argmax(1)

    @torch.no_grad()
    def update(self, labels: Tensor, previous: Tensor | None) -> None:
        self.counts += sizes(labels, self.counts)
        if previous is not None:
            self.counts -= sizes(previous.clamp(min=0), self.counts, previous >= 0)

    def end_epoch(self) -> None: ...


def sizes(labels: Tensor, like: Tensor, counted: Tensor | None = None) -> Tensor:
    """How many of `labels` (N,), of the `counted` ones if given, name each cluster, as `like` (K,)."""
    # bincount would wait for the device
    ones = torch.ones_like(labels) if counted is None else counted
    return torch.zeros_like(like).scatter_add_(0, labels, ones.to(like.dtype))


def joining(counts: Tensor, total: Tensor) -> Tensor:
    """Change of p log p, p = counts / total (K,), where one more row joins: S((n + 1) / M) - S(n / M).

    As (log((n + 1) / M) + n log(1 + 1 / n)) / M, with 0 log(1 + 1 / 0) = 0, which subtracts no equal numbers.
    """
    grown = torch.where(counts > 0, counts * torch.log1p(1 / counts.clamp(min=1)), 0.0)
    return (((counts + 1).clamp(min=1) / total).log() + grown) / total
