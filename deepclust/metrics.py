"""Scores of a clustering against labels, all from one table of counts, and its health without labels.

The counts of a batch, of a process or of the whole data set just add up, so the scores are exact for any number of
samples and processes, with more or fewer clusters than classes.
"""

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric

from deepclust.errors import InputError


class Contingency(Metric):
    """How many samples of each class lie in each cluster, (C, K), gathered over batches and processes.

    `compute` gives the entries of `scores_from_table` and `mapping` (class of each cluster in the one-to-one matching,
    -1 for none), `sizes` (samples of each cluster, unlabelled ones too) and `num_unlabelled`.
    """

    full_state_update = False
    table: Tensor

    def __init__(self, *, num_clusters: int, num_classes: int) -> None:
        super().__init__()
        self.num_clusters, self.num_classes = num_clusters, num_classes
        # The last row counts the unlabelled samples.
        empty = torch.zeros(num_classes + 1, num_clusters, dtype=torch.int64)
        self.add_state("table", default=empty, dist_reduce_fx="sum")

    def update(self, assignments: Tensor, labels: Tensor) -> None:
        """Count `assignments` (N,) in 0..K-1 against `labels` (N,) in 0..C-1, or below 0 where unknown."""
        strange = (labels >= self.num_classes) | (assignments < 0) | (assignments >= self.num_clusters)
        if strange.any():
            raise InputError(
                f"sample {int(strange.nonzero()[0])} of a batch has label {int(labels[strange][0])} and "
                f"cluster {int(assignments[strange][0])}",
                expected=f"labels below {self.num_classes} and clusters from 0 to {self.num_clusters - 1}",
                do="set dataset.num_classes and dataset.num_clusters to what there is",
            )
        cells = torch.where(labels < 0, self.num_classes, labels).long() * self.num_clusters + assignments
        self.table.view(-1).scatter_add_(0, cells, torch.ones_like(cells))

    def compute(self) -> dict[str, Any]:
        return {
            **scores_from_table(self.table[:-1]),
            "mapping": mapping_from_table(self.table[:-1]).tolist(),
            "sizes": self.table.sum(0).tolist(),
            "num_unlabelled": int(self.table[-1].sum()),
        }


def scores_from_table(table: Tensor) -> dict[str, float | None]:
    """Scores of a clustering with `table` (C, K) of counts; None for each when it counts nothing.

    acc     share of samples in the best one-to-one matching of clusters and classes
    purity  share of samples in the majority class of their cluster
    nmi     mutual information over the mean of the two entropies
    ari     Rand index corrected for chance (Hubert and Arabie, 1985)
    ami     mutual information corrected for chance, over the mean of the two entropies (Vinh et al., 2010)
    """
    counts = table.cpu().numpy()
    total = int(counts.sum())
    if total == 0:
        return dict.fromkeys(("acc", "purity", "nmi", "ari", "ami"))
    information, mean_entropy = _information(counts)
    return {
        "acc": int(counts[linear_sum_assignment(counts, maximize=True)].sum()) / total,
        "purity": int(counts.max(0).sum()) / total,
        "nmi": min(information / mean_entropy, 1.0) if mean_entropy > 0 else 1.0,
        "ari": _adjusted_rand(counts),
        "ami": _adjusted_information(counts, information, mean_entropy),
    }


def mapping_from_table(table: Tensor) -> Tensor:
    """The class of each cluster (K,) in the best one-to-one matching of `table` (C, K), -1 where it has none."""
    classes, clusters = linear_sum_assignment(table.cpu().numpy(), maximize=True)
    mapping = table.new_full(table.shape[1:], -1)
    mapping[clusters.tolist()] = torch.from_numpy(classes).to(table)
    return mapping


def cluster_health(sizes: Tensor) -> dict[str, float]:
    """What the cluster `sizes` (K,) tell without labels.

    cluster_size_entropy  entropy of the sizes over log K: 1 when all are equal, 0 when one cluster holds everything
    empty_clusters        how many clusters hold nothing
    """
    counts = sizes.cpu().numpy()
    entropy = _entropy(counts) / math.log(len(counts)) if len(counts) > 1 else 1.0
    return {"cluster_size_entropy": entropy, "empty_clusters": int((counts == 0).sum())}


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float((shares * np.log(1 / shares)).sum())


def _information(counts: np.ndarray) -> tuple[float, float]:
    """Mutual information of classes and clusters, and the mean of their entropies, in nats."""
    classes, clusters = counts.sum(1), counts.sum(0)
    rows, columns = counts.nonzero()
    total, held = counts.sum(), counts[rows, columns]
    ratios = np.log(held / total) - np.log(classes[rows] / total) - np.log(clusters[columns] / total)
    information = max(float((held * ratios).sum() / total), 0.0)
    return information, (_entropy(classes) + _entropy(clusters)) / 2


def _adjusted_rand(counts: np.ndarray) -> float:
    """In Python's integers: the products of pair counts leave 64 bits from about 100,000 samples on."""
    total = int(counts.sum())
    together, in_class, in_cluster = (
        int((sizes * (sizes - 1) // 2).sum()) for sizes in (counts, counts.sum(1), counts.sum(0))
    )
    pairs = total * (total - 1) // 2
    above = 2 * (together * pairs - in_class * in_cluster)
    below = (in_class + in_cluster) * pairs - 2 * in_class * in_cluster
    return above / below if below else 1.0  # both sides are one cluster, or both only single samples


def _adjusted_information(counts: np.ndarray, information: float, mean_entropy: float) -> float:
    classes, clusters = (sizes[sizes > 0].astype(np.float64) for sizes in (counts.sum(1), counts.sum(0)))
    if len(classes) == len(clusters) and len(classes) in (1, counts.sum()):
        return 1.0  # both sides are one cluster, or both only single samples: 0 / 0
    expected = _expected_information(classes, clusters)
    return (information - expected) / (mean_entropy - expected)


def _expected_information(classes: np.ndarray, clusters: np.ndarray) -> float:
    """Mean of the mutual information over all tables with the given sizes of classes (C,) and clusters (K,).

    Each cell is hypergeometric: sum over n of n/N log(N n / (a b)) P(n). The sum leaves out what is so far from the
    mean, by 12 standard deviations and 40, that it is less than a rounding error.
    """
    total, expected = classes.sum(), 0.0
    sizes, times = np.unique(clusters, return_counts=True)
    b = sizes[:, None]
    for a, repeats in zip(*np.unique(classes, return_counts=True), strict=True):
        mean = a * b / total
        reach = 12 * np.sqrt(mean * (1 - a / total) * (1 - b / total) * total / max(total - 1, 1)) + 40
        low = np.maximum(np.ceil(mean - reach), np.maximum(0, a + b - total))
        high = np.minimum(np.floor(mean + reach), np.minimum(a, b))
        n = low + np.arange((high - low).max() + 1)
        with np.errstate(divide="ignore", invalid="ignore"):  # beyond `high`, and at n = 0
            # From the ratios P(n + 1) / P(n): factorials of millions would cost eight digits.
            steps = np.log((a - n) * (b - n) / ((n + 1) * (total - a - b + n + 1)))
            logs = np.cumsum(np.hstack([np.zeros_like(b), steps[:, :-1]]), axis=1)
            terms = np.where(n > 0, n / total * np.log(total * n / (a * b)), 0)
        logs = np.where(n <= high, logs, -np.inf)
        weights = np.exp(logs - logs.max(1, keepdims=True))
        expected += repeats * (times * (weights * terms).sum(1) / weights.sum(1)).sum()
    return float(expected)
