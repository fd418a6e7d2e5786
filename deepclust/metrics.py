"""Scores of a clustering against labels, all from one contingency table, and its health without labels.

The scores are metrics of torchmetrics for any `LightningModule`. The tables of batches and of processes just add up, so
the scores are exact for any number of samples and processes. There may be more or fewer clusters than classes. All
scores stand in this one module, which is longer than others for that.

    >>> from torchmetrics import MetricCollection
    >>> sizes = dict(num_clusters=3, num_classes=3)
    >>> scores = MetricCollection([ClusteringAccuracy(**sizes), AdjustedRandIndex(**sizes)])
    >>> scores.update(torch.tensor([2, 2, 0, 1]), torch.tensor([0, 0, 1, 1]))  # counts once for both
    >>> {name: round(float(value), 3) for name, value in scores.compute().items()}
    {'ClusteringAccuracy': 0.75, 'AdjustedRandIndex': 0.571}
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric

from deepclust.errors import InputError


class ContingencyTable(Metric):
    """Counts how many samples of each class lie in each cluster, over batches and processes.

    Metrics with the same numbers of clusters and classes share one table in a `MetricCollection`.

    Args:
        num_clusters: the number of clusters K.
        num_classes: the number of classes C.
        options: what every metric of torchmetrics takes, such as `sync_on_compute`.

    Attributes:
        table: (C + 1, K) int64 counts of this process; the last row counts the samples without a label.

    Example:
        >>> metric = ContingencyTable(num_clusters=3, num_classes=2)
        >>> metric.update(torch.tensor([0, 0, 2, 1]), torch.tensor([0, 0, 1, -1]))
        >>> metric.compute().tolist()
        [[2, 0, 0], [0, 0, 1]]
        >>> metric.table.sum(0).tolist()  # the sizes of the clusters, with the sample of unknown class
        [2, 1, 1]

    Raises:
        InputError: if a number is negative or no whole number.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False
    table: Tensor

    def __init__(self, *, num_clusters: int, num_classes: int, **options: Any) -> None:
        super().__init__(**options)
        for name, value in (("num_clusters", num_clusters), ("num_classes", num_classes)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
                raise InputError(f"{name} is {value!r}", expected="a whole number from 0 on", do=f"set {name} to one")
        self.num_clusters, self.num_classes = int(num_clusters), int(num_classes)
        zeros = torch.zeros(self.num_classes + 1, self.num_clusters, dtype=torch.int64)
        self.add_state("table", default=zeros, dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count clusters `preds` (N,) in 0..K-1 against labels `target` (N,) in 0..C-1, or below 0 where unknown.

        Raises:
            InputError: if these are no whole numbers, not one for each sample, or out of range.
        """
        for name, ids in (("preds", preds), ("target", target)):
            if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() != 1:
                raise InputError(
                    f"{name} has the type {ids.dtype} and the shape {tuple(ids.shape)}",
                    expected="one whole number for each sample, of shape (N,)",
                    do="give the ids of clusters and classes, as .argmax(1) makes them of probabilities (N, K)",
                )
        if len(preds) != len(target):
            raise InputError(
                f"preds has {len(preds)} samples and target has {len(target)}",
                expected="a cluster and a label for each sample",
                do="give both for the same samples, with -1 for an unknown label",
            )
        preds, target = preds.long(), target.long()
        out_of_range = (target >= self.num_classes) | (preds < 0) | (preds >= self.num_clusters)
        if out_of_range.any():
            raise InputError(
                f"sample {int(out_of_range.nonzero()[0])} of a batch has label {int(target[out_of_range][0])} and "
                f"cluster {int(preds[out_of_range][0])}",
                expected=f"labels below {self.num_classes} and clusters from 0 to {self.num_clusters - 1}",
                do="set num_clusters and num_classes to the numbers of clusters and classes; on the command line they "
                "are dataset.num_clusters and dataset.num_classes",
            )
        cells = torch.where(target < 0, self.num_classes, target) * self.num_clusters + preds
        self.table.view(-1).scatter_add_(0, cells, torch.ones_like(cells))

    def compute(self) -> Any:
        """Return the counts (C, K) int64 of the samples of known class, of all processes."""
        return self.table[:-1]

    def set_dtype(self, dst_type: str | torch.dtype) -> "ContingencyTable":
        """Change nothing: counts of another type would not be exact."""
        return self


class TableScore(ContingencyTable):
    """A score, or several, of the counts (C, K). Arguments and `update` are those of `ContingencyTable`."""

    higher_is_better = True
    plot_upper_bound = 1.0

    @abstractmethod
    def compute(self) -> Any:
        """Return the score of all samples of all processes as a scalar tensor; nan without any known label."""

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot `val`, one result or a list of them, by default what `compute` returns; return figure and axes."""
        return self._plot(val, ax)

    def _as_tensor(self, value: float | None) -> Tensor:
        dtype = torch.float32 if self.table.device.type == "mps" else torch.float64  # that device has no float64
        return torch.tensor(math.nan if value is None else value, dtype=dtype, device=self.table.device)


class ClusteringScores(TableScore):
    """All scores of `compute_scores` at once: ACC, purity, NMI, ARI and AMI.

    Args:
        num_clusters: the number of clusters K.
        num_classes: the number of classes C.
        options: what every metric of torchmetrics takes.

    Example:
        >>> metric = ClusteringScores(num_clusters=2, num_classes=2)
        >>> metric.update(preds=torch.tensor([1, 1, 0, 0, 0]), target=torch.tensor([0, 0, 1, 1, 0]))
        >>> {name: round(score.item(), 3) for name, score in metric.compute().items()}
        {'acc': 0.8, 'purity': 0.8, 'nmi': 0.433, 'ari': 0.167, 'ami': 0.251}
    """

    def compute(self) -> dict[str, Tensor]:
        """Return the scores by name (acc, purity, nmi, ari, ami), scalar tensors; nan without any known label."""
        return {name: self._as_tensor(score) for name, score in compute_scores(self.table[:-1]).items()}


class ClusteringAccuracy(TableScore):
    """ACC: the share of samples whose class is matched to their cluster, in the best one-to-one matching.

    It lies in [0, 1]. With more clusters than classes, samples in clusters without a class count as wrong.

    Args:
        num_clusters: the number of clusters K.
        num_classes: the number of classes C.
        options: what every metric of torchmetrics takes.

    Example:
        >>> metric = ClusteringAccuracy(num_clusters=3, num_classes=2)
        >>> metric.update(preds=torch.tensor([2, 2, 0, 1]), target=torch.tensor([0, 0, 1, 1]))
        >>> metric.compute().item()
        0.75
    """

    plot_lower_bound = 0.0

    def compute(self) -> Tensor:
        """Return the ACC of all samples of all processes, a scalar tensor; nan without any known label."""
        return self._as_tensor(_score_counts(self.table[:-1], _accuracy))


class NormalizedMutualInformation(TableScore):
    """NMI: the mutual information of clusters and classes over the arithmetic mean of their entropies, in [0, 1].

    Args:
        num_clusters: the number of clusters K.
        num_classes: the number of classes C.
        options: what every metric of torchmetrics takes.

    Example:
        >>> metric = NormalizedMutualInformation(num_clusters=2, num_classes=2)
        >>> metric.update(preds=torch.tensor([1, 1, 0, 0]), target=torch.tensor([0, 0, 1, 1]))
        >>> metric.compute().item()
        1.0
    """

    plot_lower_bound = 0.0

    def compute(self) -> Tensor:
        """Return the NMI of all samples of all processes, a scalar tensor; nan without any known label."""
        return self._as_tensor(_score_counts(self.table[:-1], _normalized_mutual_information))


class AdjustedRandIndex(TableScore):
    """ARI: the Rand index corrected for chance (Hubert and Arabie, 1985), 0 on average for random clusters, 1 at best.

    Args:
        num_clusters: the number of clusters K.
        num_classes: the number of classes C.
        options: what every metric of torchmetrics takes.

    Example:
        >>> metric = AdjustedRandIndex(num_clusters=2, num_classes=2)
        >>> metric.update(preds=torch.tensor([0, 1, 0, 1]), target=torch.tensor([0, 0, 1, 1]))
        >>> metric.compute().item()
        -0.5
    """

    plot_lower_bound = -0.5

    def compute(self) -> Tensor:
        """Return the ARI of all samples of all processes, a scalar tensor; nan without any known label."""
        return self._as_tensor(_score_counts(self.table[:-1], _adjusted_rand_index))


def compute_scores(table: Tensor) -> dict[str, float | None]:
    """Return the scores of a clustering from its contingency `table` (C, K); each is None if the table is empty.

    acc     share of samples whose class is matched to their cluster, in the best one-to-one matching
    purity  share of samples in the majority class of their cluster
    nmi     mutual information over the mean of the two entropies
    ari     Rand index corrected for chance (Hubert and Arabie, 1985)
    ami     mutual information corrected for chance, over the mean of the two entropies (Vinh et al., 2010)
    """
    scores: dict[str, Callable[[np.ndarray], float]] = {
        "acc": _accuracy,
        "purity": _purity,
        "nmi": _normalized_mutual_information,
        "ari": _adjusted_rand_index,
        "ami": _adjusted_mutual_information,
    }
    return {name: _score_counts(table, score) for name, score in scores.items()}


def match_clusters_to_classes(table: Tensor) -> Tensor:
    """Return the class of each cluster (K,) in the best one-to-one matching of `table` (C, K), -1 where it has none."""
    classes, clusters = linear_sum_assignment(table.cpu().numpy(), maximize=True)
    mapping = table.new_full(table.shape[1:], -1)
    mapping[clusters.tolist()] = torch.from_numpy(classes).to(table)
    return mapping


def overclustering_accuracy(table: Tensor) -> float | None:
    """Return the share of samples in the class of their cluster, from `table` (C, K); None if the table is empty.

    With more clusters than classes, neither counted where empty, clusters of the best one-to-one matching stand for
    their class, and every other cluster for the class that it holds most of (TEMI's ACC for over-clustering). Otherwise
    it is ACC. Where several matchings are best, it is that of the authors' square table.
    """
    counts = table.cpu().numpy()
    if counts.sum() == 0:
        return None
    if counts.any(0).sum() <= counts.any(1).sum():
        return _accuracy(counts)
    size = max(counts.shape)
    square = np.zeros((size, size), counts.dtype)  # of clusters and classes
    square[: counts.shape[1], : counts.shape[0]] = counts.T
    classes = linear_sum_assignment(square.max() - square)[1]
    classes = np.where((square.sum(0) > 0)[classes], classes, square.argmax(1))
    return int(square[np.arange(size), classes].sum()) / int(counts.sum())


def smallest_classes_recall(table: Tensor) -> float | None:
    """Return the mean recall of the smallest third of the classes, from `table` (C, K); None if the table is empty.

    The recall of a class is the share of its samples in the cluster that it is matched to by the best one-to-one
    matching of all classes and clusters, as in ACC; 0 where it is matched to none. Of the classes that have samples, a
    third is rounded down, but is at least one; of equally large ones, those with the lower numbers count as smaller.
    """
    counts = table.cpu().numpy()
    sizes = counts.sum(1)
    if sizes.sum() == 0:
        return None
    smallest = np.argsort(sizes, kind="stable")[(sizes == 0).sum() :][: max(1, int((sizes > 0).sum()) // 3)]
    recalls = np.zeros(len(sizes))
    classes, clusters = linear_sum_assignment(counts, maximize=True)
    recalls[classes] = counts[classes, clusters] / np.maximum(sizes[classes], 1)
    return float(recalls[smallest].mean())


def cluster_health(sizes: Tensor) -> dict[str, float]:
    """Return two signs of degenerate clusters, from cluster `sizes` (K,) alone.

    cluster_size_entropy  entropy of the sizes over log K: 1 if all are equal, 0 if one cluster holds everything
    empty_clusters        the number of empty clusters
    """
    counts = sizes.cpu().numpy()
    entropy = _entropy(counts) / math.log(len(counts)) if len(counts) > 1 else 1.0
    return {"cluster_size_entropy": entropy, "empty_clusters": int((counts == 0).sum())}


def _score_counts(table: Tensor, score: Callable[[np.ndarray], float]) -> float | None:
    """Return a score of the counts in `table` (C, K), or None if it is empty."""
    counts = table.cpu().numpy()
    return score(counts) if counts.sum() > 0 else None


def _accuracy(counts: np.ndarray) -> float:
    return int(counts[linear_sum_assignment(counts, maximize=True)].sum()) / int(counts.sum())


def _purity(counts: np.ndarray) -> float:
    return int(counts.max(0).sum()) / int(counts.sum())


def _normalized_mutual_information(counts: np.ndarray) -> float:
    information, mean_entropy = _mutual_information_and_mean_entropy(counts)
    return min(information / mean_entropy, 1.0) if mean_entropy > 0 else 1.0


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


def _adjusted_mutual_information(counts: np.ndarray) -> float:
    class_sizes, cluster_sizes = (sizes[sizes > 0].astype(np.float64) for sizes in (counts.sum(1), counts.sum(0)))
    if len(class_sizes) == len(cluster_sizes) and len(class_sizes) in (1, counts.sum()):
        return 1.0  # classes and clusters are both one group, or both only single samples: 0 / 0
    expected = _expected_mutual_information(class_sizes, cluster_sizes)
    information, mean_entropy = _mutual_information_and_mean_entropy(counts)
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
