"""Scores of a clustering against labels, all from one contingency table, and its health without labels.

The tables of batches and of processes just add up, so the scores are exact for any number of samples and processes.
There may be more or fewer clusters than classes.
"""

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric

from deepclust.errors import InputError


class ClusteringScores(Metric):
    """Counts how many samples of each class lie in each cluster, over batches and processes, and scores the clusters.

    `compute` returns the entries of `compute_scores` and

    mapping         the class of each cluster in the one-to-one matching, -1 for none
    sizes           the number of samples in each cluster, unlabelled ones included
    num_unlabelled  the number of samples without a label
    """

    full_state_update = False
    table: Tensor

    def __init__(self, *, num_clusters: int, num_classes: int) -> None:
        super().__init__()
        self.num_clusters, self.num_classes = num_clusters, num_classes
        # (C + 1, K): the last row counts the unlabelled samples.
        zeros = torch.zeros(num_classes + 1, num_clusters, dtype=torch.int64)
        self.add_state("table", default=zeros, dist_reduce_fx="sum")

    def update(self, assignments: Tensor, labels: Tensor) -> None:
        """Count `assignments` (N,) in 0..K-1 against `labels` (N,) in 0..C-1, or below 0 where unknown.

        Raises:
            InputError: if an assignment or a label is out of range.
        """
        out_of_range = (labels >= self.num_classes) | (assignments < 0) | (assignments >= self.num_clusters)
        if out_of_range.any():
            raise InputError(
                f"sample {int(out_of_range.nonzero()[0])} of a batch has label {int(labels[out_of_range][0])} and "
                f"cluster {int(assignments[out_of_range][0])}",
                expected=f"labels below {self.num_classes} and clusters from 0 to {self.num_clusters - 1}",
                do="set dataset.num_classes and dataset.num_clusters to the numbers of classes and clusters",
            )
        cells = torch.where(labels < 0, self.num_classes, labels).long() * self.num_clusters + assignments
        self.table.view(-1).scatter_add_(0, cells, torch.ones_like(cells))

    def compute(self) -> dict[str, Any]:
        return {
            **compute_scores(self.table[:-1]),
            "mapping": match_clusters_to_classes(self.table[:-1]).tolist(),
            "sizes": self.table.sum(0).tolist(),
            "num_unlabelled": int(self.table[-1].sum()),
        }


def compute_scores(table: Tensor) -> dict[str, float | None]:
    """Return the scores of a clustering from its contingency `table` (C, K); each is None if the table is empty.

    acc     share of samples whose class is matched to their cluster, in the best one-to-one matching
    purity  share of samples in the majority class of their cluster
    nmi     mutual information over the mean of the two entropies
    ari     Rand index corrected for chance (Hubert and Arabie, 1985)
    ami     mutual information corrected for chance, over the mean of the two entropies (Vinh et al., 2010)
    """
    counts = table.cpu().numpy()
    total = int(counts.sum())
    if total == 0:
        return dict.fromkeys(("acc", "purity", "nmi", "ari", "ami"))
    information, mean_entropy = _mutual_information_and_mean_entropy(counts)
    return {
        "acc": int(counts[linear_sum_assignment(counts, maximize=True)].sum()) / total,
        "purity": int(counts.max(0).sum()) / total,
        "nmi": min(information / mean_entropy, 1.0) if mean_entropy > 0 else 1.0,
        "ari": _adjusted_rand_index(counts),
        "ami": _adjusted_mutual_information(counts, information, mean_entropy),
    }


def match_clusters_to_classes(table: Tensor) -> Tensor:
    """Return the class of each cluster (K,) in the best one-to-one matching of `table` (C, K), -1 where it has none."""
    classes, clusters = linear_sum_assignment(table.cpu().numpy(), maximize=True)
    mapping = table.new_full(table.shape[1:], -1)
    mapping[clusters.tolist()] = torch.from_numpy(classes).to(table)
    return mapping


def cluster_health(sizes: Tensor) -> dict[str, float]:
    """Return two signs of degenerate clusters, from cluster `sizes` (K,) alone.

    cluster_size_entropy  entropy of the sizes over log K: 1 if all are equal, 0 if one cluster holds everything
    empty_clusters        the number of empty clusters
    """
    counts = sizes.cpu().numpy()
    entropy = _entropy(counts) / math.log(len(counts)) if len(counts) > 1 else 1.0
    return {"cluster_size_entropy": entropy, "empty_clusters": int((counts == 0).sum())}


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float((shares * np.log(1 / shares)).sum())


def _mutual_information_and_mean_entropy(counts: np.ndarray) -> tuple[float, float]:
    """Return the mutual information of classes and clusters, and the mean of their entropies, in nats."""
    class_sizes, cluster_sizes = counts.sum(1), counts.sum(0)
    rows, columns = counts.nonzero()
    total, cells = counts.sum(), counts[rows, columns]
    log_ratios = np.log(cells / total) - np.log(class_sizes[rows] / total) - np.log(cluster_sizes[columns] / total)
    information = max(float((cells * log_ratios).sum() / total), 0.0)
    return information, (_entropy(class_sizes) + _entropy(cluster_sizes)) / 2


def _adjusted_rand_index(counts: np.ndarray) -> float:
    """Computed in Python's integers: from about 100,000 samples on, products of pair counts do not fit into 64 bits."""
    total = int(counts.sum())
    pairs_in_both, pairs_in_class, pairs_in_cluster = (
        int((sizes * (sizes - 1) // 2).sum()) for sizes in (counts, counts.sum(1), counts.sum(0))
    )
    pairs = total * (total - 1) // 2
    numerator = 2 * (pairs_in_both * pairs - pairs_in_class * pairs_in_cluster)
    denominator = (pairs_in_class + pairs_in_cluster) * pairs - 2 * pairs_in_class * pairs_in_cluster
    if denominator == 0:  # classes and clusters are both one group, or both only single samples
        return 1.0
    return numerator / denominator


def _adjusted_mutual_information(counts: np.ndarray, information: float, mean_entropy: float) -> float:
    class_sizes, cluster_sizes = (sizes[sizes > 0].astype(np.float64) for sizes in (counts.sum(1), counts.sum(0)))
    if len(class_sizes) == len(cluster_sizes) and len(class_sizes) in (1, counts.sum()):
        return 1.0  # classes and clusters are both one group, or both only single samples: 0 / 0
    expected = _expected_mutual_information(class_sizes, cluster_sizes)
    return (information - expected) / (mean_entropy - expected)


def _expected_mutual_information(class_sizes: np.ndarray, cluster_sizes: np.ndarray) -> float:
    """Return the mean of the mutual information over all tables with these sizes of classes (C,) and clusters (K,).

    The count n of a cell with class size a and cluster size b is hypergeometric: the cell adds the sum over n of
    n/N log(N n / (a b)) P(n). Counts further from the mean than 12 standard deviations and 40 are left out: they add
    less than a rounding error.
    """
    total, expected = class_sizes.sum(), 0.0
    # Equal sizes have equal sums, so each size is computed once and counted as often as it occurs.
    b, b_repeats = np.unique(cluster_sizes, return_counts=True)
    b = b[:, None]
    for a, a_repeats in zip(*np.unique(class_sizes, return_counts=True), strict=True):
        mean = a * b / total
        radius = 12 * np.sqrt(mean * (1 - a / total) * (1 - b / total) * total / max(total - 1, 1)) + 40
        low = np.maximum(np.ceil(mean - radius), np.maximum(0, a + b - total))
        high = np.minimum(np.floor(mean + radius), np.minimum(a, b))
        n = low + np.arange((high - low).max() + 1)
        with np.errstate(divide="ignore", invalid="ignore"):  # beyond `high`, and at n = 0
            # P(n) up to a factor, from the ratios P(n + 1) / P(n): factorials of millions would cost eight digits.
            log_steps = np.log((a - n) * (b - n) / ((n + 1) * (total - a - b + n + 1)))
            log_weights = np.cumsum(np.hstack([np.zeros_like(b), log_steps[:, :-1]]), axis=1)
            terms = np.where(n > 0, n / total * np.log(total * n / (a * b)), 0)
        log_weights = np.where(n <= high, log_weights, -np.inf)
        weights = np.exp(log_weights - log_weights.max(1, keepdims=True))
        expected += a_repeats * (b_repeats * (weights * terms).sum(1) / weights.sum(1)).sum()
    return float(expected)
