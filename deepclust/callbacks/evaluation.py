"""Evaluation: one clean pass over the images, clusters by the method's own rule and by k-means, and their scores.

Labels enter here and nowhere in training: without this callback the learned weights are the same, bit for bit.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningDataModule, Trainer
from torch import Tensor

from deepclust.clustering.assignment_rules import (
    CHUNK_SIZE,
    assign_by_own_rule,
    assign_to_centroids,
    cluster_means,
    mean_squared_distance,
)
from deepclust.clustering.cluster_tree import ClusterTree
from deepclust.clustering.dendrogram_purity import dendrogram_purity
from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from deepclust.clustering.kmeans import KMeansResult
from deepclust.clustering.kmeans_distances import nearest_centroids
from deepclust.methods.base import ClusteringMethod
from deepclust.metrics import ContingencyTable, cluster_health, compute_scores, smallest_classes_recall
from deepclust.number_types import AnyInt, NonNegativeFloat, PositiveInt
from deepclust.score_names import SCORE_NAMES


@dataclass(frozen=True)
class EvaluationResult:
    """The clusters, scores and health of a method on M evaluation images.

    Attributes:
        scores: ACC, NMI and ARI as fractions, by rule (`method`, `kmeans`); None without that rule or labels.
        health: what `cluster_health` says of the sizes of the clusters, without labels.
        assignments: (M,) int64, by the method's own rule, or by k-means if it has none.
        confidence: (M,) in [0, 1], of the assignments.
        features: (M, D).
        assignment_state: what assigns new images, for the checkpoint: k-means' centroids and scale, and cluster means.
        contingency_table: (C, K) counts of images by class and assignment; None without labels.
        samples: generated images of each cluster, (K, S, H, W, channels) uint8; None if the method generates none.
        tree: of the images of the fit set; None if the method finds none.
        dendrogram_purity: of the tree; None without one, or without labels of the images that it is of.
    """

    scores: dict[str, dict[str, float] | None]
    health: dict[str, float]
    assignments: Tensor
    confidence: Tensor
    features: Tensor
    assignment_state: dict[str, Tensor]
    contingency_table: Tensor | None
    samples: np.ndarray | None = None
    tree: ClusterTree | None = None
    dendrogram_purity: float | None = None

    @property
    def num_clusters(self) -> int:
        """The number of clusters K, empty ones included."""
        return len(self.assignment_state["cluster_means"])

    @property
    def ami(self) -> float | None:
        """The adjusted mutual information of the assignments and the labels; None without known labels."""
        return None if self.contingency_table is None else compute_scores(self.contingency_table)["ami"]

    @property
    def smallest_classes_recall(self) -> float | None:
        """The mean recall of the smallest third of the classes by the assignments; None without known labels."""
        return None if self.contingency_table is None else smallest_classes_recall(self.contingency_table)


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates a method: scores its own rule, and k-means on its features, against the labels of a data set.

    Args:
        images: the source of the M evaluation images.
        labels: their labels (M,) int64, -1 where unknown; None if there are none.
        num_classes: the number of classes C among the labels.
        num_clusters: the number of clusters K, where the method has not found another.
        kmeans_restarts: how often k-means starts anew; the best result counts.
        kmeans_max_iterations: of one restart.
        kmeans_tolerance: as in `kmeans`.
        seed: of the restarts.
        kmeans_rows: positions of the images that k-means is fitted to; each other one gets the nearest centre. None:
            all of them are fitted.
    """

    images: Any
    labels: np.ndarray | None
    num_classes: PositiveInt
    num_clusters: PositiveInt
    kmeans_restarts: PositiveInt
    kmeans_max_iterations: PositiveInt
    kmeans_tolerance: NonNegativeFloat
    seed: AnyInt
    kmeans_rows: np.ndarray | None = None

    def __call__(self, method: ClusteringMethod, datamodule: LightningDataModule) -> EvaluationResult:
        """Evaluate `method` as it is now. Every process calls this and gets the same result."""
        if method.num_clusters != self.num_clusters:
            return replace(self, num_clusters=method.num_clusters)(method, datamodule)
        batches = datamodule.clean_batches(self.images, method.device)  # type: ignore[attr-defined]
        features = method.encode_all(batches, len(self.images))
        kmeans_result = self.run_kmeans(features, purpose="k-means on the features")
        centroids = kmeans_result.centroids
        scale = mean_squared_distance(features, centroids, kmeans_result.assignments)
        by_own_rule = assign_by_own_rule(method.cluster_logits, features, num_clusters=self.num_clusters)
        tree = method.cluster_tree()
        samples = method.sample_images((self.seed, "sample images"))
        assignments, confidence = by_own_rule or assign_to_centroids(features, centroids, scale)
        return EvaluationResult(
            scores={
                "method": self.score(by_own_rule[0]) if by_own_rule else None,
                "kmeans": self.score(kmeans_result.assignments),
            },
            health=cluster_health(torch.bincount(assignments, minlength=self.num_clusters)),
            assignments=assignments.cpu(),
            confidence=confidence.cpu(),
            features=features,
            assignment_state={
                "kmeans_centroids": centroids,
                "kmeans_scale": scale,
                "cluster_means": cluster_means(features, assignments, self.num_clusters),
            },
            contingency_table=self.compute_contingency_table(assignments),
            samples=None if samples is None else to_pixels(samples),
            tree=tree,
            dendrogram_purity=self.score_tree(tree) if self.images is datamodule.fit else None,  # type: ignore[attr-defined]
        )

    def score_tree(self, tree: ClusterTree | None) -> float | None:
        """Return the dendrogram purity of a tree of the evaluation images, or None without tree or labels."""
        return None if tree is None or self.labels is None else dendrogram_purity(tree.partitions, self.labels)

    def score_pixels(self, *, max_values: int) -> dict[str, float] | None:
        """Score k-means on the pixels of the evaluation images, a baseline for the features.

        Returns None without labels, for images in their own shapes, whose pixels do not correspond, or if all images
        together have more than `max_values` values.
        """
        if self.labels is None or self.images.shape[0] is None:
            return None
        if len(self.images) * int(np.prod(self.images.shape)) > max_values:
            return None
        pixels = self.images.read(np.arange(len(self.images))).flatten(1).float() / 255
        return self.score(self.run_kmeans(pixels, purpose="k-means on pixels").assignments)

    def run_kmeans(self, rows: Tensor, *, purpose: str) -> KMeansResult:
        """Cluster rows (M, D) by k-means, with random numbers that depend on the seed and on `purpose`."""
        result = kmeans_on_all_ranks(
            rows if self.kmeans_rows is None else rows[self.kmeans_rows],
            num_clusters=self.num_clusters,
            metric="euclidean",
            num_restarts=self.kmeans_restarts,
            max_iterations=self.kmeans_max_iterations,
            tolerance=self.kmeans_tolerance,
            key=(self.seed, purpose),
        )
        if self.kmeans_rows is None:
            return result
        chunks = [nearest_centroids(c, result.centroids, metric="euclidean")[0] for c in rows.split(CHUNK_SIZE)]
        return replace(result, assignments=torch.cat(chunks))

    def compute_contingency_table(self, assignments: Tensor) -> Tensor | None:
        """Return the counts (C, K) of images by class and by assignment (M,), or None without labels."""
        if self.labels is None:
            return None
        metric = ContingencyTable(num_clusters=self.num_clusters, num_classes=self.num_classes)
        metric.update(assignments.cpu(), torch.from_numpy(self.labels))
        return metric.table[:-1]  # the last row counts the images of unknown class

    def score(self, assignments: Tensor) -> dict[str, float] | None:
        """Return ACC, NMI and ARI of assignments (M,), or None without any known label."""
        table = self.compute_contingency_table(assignments)
        if table is None:
            return None
        all_scores = compute_scores(table)
        scores = {name: value for name in SCORE_NAMES if (value := all_scores[name]) is not None}
        return scores or None


def to_pixels(images: Tensor) -> np.ndarray:
    """Return images (..., channels, H, W) in [0, 1] as uint8 pixels (..., H, W, channels)."""
    return (255 * images).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).cpu().numpy()


class Evaluation(Callback):
    """Evaluates every `every_n_epochs` epochs; logs scores as `eval/<rule>/<score>` and health as `eval/<name>`."""

    def __init__(self, *, evaluator: Evaluator, every_n_epochs: PositiveInt) -> None:
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
