"""The report of one run: its results, pictures, map and curves, put together and written as report.html."""

from pathlib import Path
from typing import Any

from deepclust.callbacks.evaluation import EvaluationResult
from deepclust.datasets.image_sources import ImageSet, ImageSource
from deepclust.report.cluster_pictures import Sheet, cluster_sheets
from deepclust.report.embedding_map import embedding_map
from deepclust.report.page import write_report


def write_run_report(
    folder: Path,
    results: dict[str, Any],
    evaluation: EvaluationResult,
    images: ImageSet,
    *,
    seed: int,
    per_cluster: int,
    map_points: int,
    config_text: str,
) -> list[Sheet]:
    """Write report.html into a run folder and return what it shows of each cluster.

    `per_cluster` images of each kind are shown for a cluster, and at most `map_points` images on the map.
    """
    assignments, confidence = evaluation.assignments.numpy(), evaluation.confidence.numpy()
    shown: dict[str, Any] = {
        "source": find_pictures(images),
        "labels": images.labels,
        "paths": images.paths,
        "seed": seed,
    }
    sheets = cluster_sheets(assignments, confidence, class_names=images.class_names, per_cluster=per_cluster, **shown)
    embedding = embedding_map(evaluation.features, assignments, confidence, max_points=map_points, **shown)
    write_report(
        folder / "report.html",
        results=results,
        sheets=sheets,
        embedding=embedding,
        table=None if evaluation.table is None else evaluation.table.numpy(),
        class_names=images.class_names,
        curves=folder / "metrics.csv",
        config_text=config_text,
    )
    return sheets


def find_pictures(images: ImageSet) -> ImageSource | None:
    """Return what the evaluation images look like; None for vectors without pictures."""
    is_vectors = images.evaluation.shape[:2] == (1, 1)
    return images.pictures if is_vectors else images.evaluation
