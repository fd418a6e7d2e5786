"""The report of one run: its results, pictures, map and curves, put together and written as report.html."""

from pathlib import Path
from typing import Any

from deepclust.callbacks.evaluation import EvaluationResult
from deepclust.datasets.image_sources import ImageSet, ImageSource
from deepclust.report.cluster_pictures import ClusterPictures, choose_cluster_pictures
from deepclust.report.embedding_map import compute_embedding_map
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
) -> list[ClusterPictures]:
    """Write report.html into a run folder and return what it shows of each cluster.

    Each list of pictures of a cluster has at most `per_cluster` images, the map at most `map_points`.
    """
    assignments, confidence = evaluation.assignments.numpy(), evaluation.confidence.numpy()
    image_options: dict[str, Any] = {
        "source": find_pictures(images),
        "labels": images.labels,
        "paths": images.paths,
        "seed": seed,
    }
    clusters = choose_cluster_pictures(
        assignments, confidence, class_names=images.class_names, per_cluster=per_cluster, **image_options
    )
    embedding = compute_embedding_map(
        evaluation.features, assignments, confidence, max_points=map_points, **image_options
    )
    write_report(
        folder / "report.html",
        results=results,
        clusters=clusters,
        embedding=embedding,
        contingency_table=None if evaluation.contingency_table is None else evaluation.contingency_table.numpy(),
        class_names=images.class_names,
        metrics_file=folder / "metrics.csv",
        config_text=config_text,
    )
    return clusters


def find_pictures(images: ImageSet) -> ImageSource | None:
    """Return the pictures of the evaluation images: for vectors those given with them, if any, else the images."""
    is_vectors = images.evaluation.shape[:2] == (1, 1)
    return images.pictures if is_vectors else images.evaluation
