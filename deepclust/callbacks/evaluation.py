"""Scores of a method: the only reader of labels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningDataModule, Trainer
from torch import Tensor

from deepclust.clustering.distributed_kmeans import dealt_kmeans
from deepclust.methods.base import ClusteringMethod
from deepclust.metrics import Contingency, cluster_health, scores_from_table

ROWS = 65536  # features at a time


@dataclass(frozen=True)
class EvaluationResult:
    """What one clean pass over the evaluation images says."""

    scores: dict[str, dict[str, float] | None]  # by rule, `method` and `kmeans`; fractions; None without rule or labels
    health: dict[str, float]  # label-free
    assignments: Tensor  # (M,) int64, by the method's own rule, else by k-means
    confidence: Tensor  # (M,) in [0, 1]
    features: Tensor  # (M, D)
    assignment_state: dict[str, Tensor]  # what new images are assigned with
    table: Tensor | None  # (C, K) counts, without labels None


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Scores a method on a data set by its own rule and by k-means on its features.

    `labels` (M,) are int64, -1 where unknown, or None; `images` is the source that they belong to.
    """

    images: Any
    labels: np.ndarray | None
    num_classes: int
    num_clusters: int
    kmeans_restarts: int
    kmeans_max_iterations: int
    kmeans_tolerance: float
    seed: int

    def __call__(self, method: ClusteringMethod, datamodule: LightningDataModule) -> EvaluationResult:
        """One clean pass; on several processes each calls it and gets the same."""
        batches = datamodule.clean_batches(self.images, method.device)  # type: ignore[attr-defined]
        features = method.encode_all(batches, len(self.images))
        fitted = dealt_kmeans(
            features,
            num_clusters=self.num_clusters,
            metric="euclidean",
            num_restarts=self.kmeans_restarts,
            max_iterations=self.kmeans_max_iterations,
            tolerance=self.kmeans_tolerance,
            key=(self.seed, "k-means on the features"),
        )
        scale = mean_squared_distance(features, fitted.centroids, fitted.assignments)
        own = assign_by_own_rule(method, features)
        assignments, confidence = own or assign_to_centroids(features, fitted.centroids, scale)
        scores = {
            "method": self.score(own[0])[0] if own else None,
            "kmeans": self.score(fitted.assignments)[0],
        }
        health = cluster_health(torch.bincount(assignments, minlength=self.num_clusters))
        table = self.score(assignments)[1]
        return EvaluationResult(
            scores,
            health,
            assignments.cpu(),
            confidence.cpu(),
            features,
            {
                "kmeans_centroids": fitted.centroids,
                "kmeans_scale": scale,
                "cluster_means": cluster_means(features, assignments, self.num_clusters),
            },
            table,
        )

    def score_pixels(self, *, max_values: int) -> dict[str, float] | None:
        """Score k-means on the pixels of the evaluation images; None without labels or above `max_values` values."""
        if self.labels is None or len(self.images) * int(np.prod(self.images.shape)) > max_values:
            return None
        pixels = self.images.read(np.arange(len(self.images))).flatten(1).float() / 255
        fitted = dealt_kmeans(
            pixels,
            num_clusters=self.num_clusters,
            metric="euclidean",
            num_restarts=self.kmeans_restarts,
            max_iterations=self.kmeans_max_iterations,
            tolerance=self.kmeans_tolerance,
            key=(self.seed, "k-means on pixels"),
        )
        return self.score(fitted.assignments)[0]

    def score(self, assignments: Tensor) -> tuple[dict[str, float] | None, Tensor | None]:
        """ACC, NMI and ARI, and the count table; None, None without labels."""
        if self.labels is None:
            return None, None
        metric = Contingency(num_clusters=self.num_clusters, num_classes=self.num_classes)
        metric.update(assignments.cpu(), torch.from_numpy(self.labels))
        table = metric.table[:-1]  # its last row counts the unlabelled
        values = scores_from_table(table)
        scores = {name: value for name in ("acc", "nmi", "ari") if (value := values[name]) is not None}
        return scores or None, table  # none where every label is unknown


def assign_by_own_rule(method: ClusteringMethod, features: Tensor) -> tuple[Tensor, Tensor] | None:
    """Clusters (M,) and confidence (M,) of features (M, D) by the method's own rule; None where it has none."""
    parts = []
    with torch.no_grad():
        for chunk in features.split(ROWS):
            logits = method.cluster_logits(chunk)
            if logits is None:
                return None
            parts.append((logits.argmax(1), logits.softmax(1).amax(1)))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def cluster_means(features: Tensor, assignments: Tensor, num_clusters: int) -> Tensor:
    """Mean features (K, D) of the clusters of features (M, D); nan where a cluster is empty."""
    sums = features.new_zeros(num_clusters, features.shape[1]).index_add_(0, assignments, features)
    return sums / torch.bincount(assignments, minlength=num_clusters)[:, None]


def mean_squared_distance(features: Tensor, centroids: Tensor, assignments: Tensor) -> Tensor:
    """Mean squared distance of features (M, D) to their own centroids (K, D); a scalar above 0."""
    pairs = zip(features.split(ROWS), assignments.split(ROWS), strict=True)
    total = torch.stack([(rows - centroids[own]).square().sum() for rows, own in pairs]).sum()
    return (total / len(features)).clamp(min=1e-12)


def assign_to_centroids(features: Tensor, centroids: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Clusters (M,) and confidence (M,) of features (M, D): those of equal Gaussians at the centroids (K, D).

    Confidence is the largest softmax of minus squared distance over 2 `scale`, the `mean_squared_distance` of the
    features that the centroids were fitted to.
    """
    parts = [
        (-torch.cdist(chunk, centroids).square() / (2 * scale)).softmax(1).max(1) for chunk in features.split(ROWS)
    ]
    return torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts])


class Evaluation(Callback):
    """Logs the scores every `every_n_epochs` epochs as `eval/<rule>/<score>` and the health as `eval/<name>`."""

    def __init__(self, *, evaluator: Evaluator, every_n_epochs: int) -> None:
        self.evaluator = evaluator
        self.every_n_epochs = every_n_epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: ClusteringMethod) -> None:  # type: ignore[override]
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        result = self.evaluator(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        for rule, scores in result.scores.items():
            for name, value in (scores or {}).items():
                pl_module.log(f"eval/{rule}/{name}", value, rank_zero_only=True)
        for name, value in result.health.items():
            pl_module.log(f"eval/{name}", float(value), rank_zero_only=True)
