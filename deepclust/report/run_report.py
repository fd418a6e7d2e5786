"""The report of one run: its results, pictures, map and curves, put together and written as report.html."""

from pathlib import Path
from typing import Any

from deepclust.callbacks.evaluation import EvaluationResult
from deepclust.datasets.image_sources import ImageSet, ImageSource
from deepclust.report.cluster_pictures import ClusterPictures, choose_cluster_pictures
from deepclust.report.drawers import render_drawers
from deepclust.report.embedding_map import compute_embedding_map
from deepclust.report.findings import Findings
from deepclust.report.findings_sections import choose_finding_pictures
from deepclust.report.page import write_report
from deepclust.report.shown_paths import hide_places_in_command, show_image_paths


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
    absolute_paths: bool,
    findings: Findings | None = None,
) -> list[ClusterPictures]:
    """Write report.html into a run folder and return what it shows of each cluster.

    Each list of pictures of a cluster has at most `per_cluster` images, the map at most `map_points`. Where
    `per_cluster` is 0, there are no pictures at all. Paths are shown relative to the images and the report unless
    `absolute_paths`; `findings` are those of `deepclust cluster`.
    """
    assignments, confidence = evaluation.assignments.numpy(), evaluation.confidence.numpy()
    root = Path(results["images"]) if "images" in results else None
    shown_paths = show_image_paths(images.paths, folder, root=root, absolute=absolute_paths)
    source, names = find_pictures(images) if per_cluster > 0 else None, {"paths": shown_paths.names}
    image_options: dict[str, Any] = {"source": source, "labels": images.labels, "seed": seed, **names}
    clusters = choose_cluster_pictures(
        assignments,
        confidence,
        class_names=images.class_names,
        per_cluster=per_cluster,
        links=shown_paths.link,
        **image_options,
    )
    linked: dict[str, Any] = {"source": source, "links": shown_paths.link, **names}
    drawers = render_drawers(assignments, confidence, clusters=[c.cluster for c in clusters], **linked)
    pictures_of_findings: dict[str, Any] = {}
    if findings is not None:
        pictures_of_findings["finding_pictures"] = choose_finding_pictures(findings, assignments, **linked)
    embedding = compute_embedding_map(
        evaluation.features, assignments, confidence, max_points=map_points, **image_options
    )
    shown_results = results
    if not absolute_paths:
        shown_results = results | {"command": hide_places_in_command(results["command"], folder)}
    write_report(
        folder / "report.html",
        results=shown_results,
        clusters=clusters,
        embedding=embedding,
        contingency_table=None if evaluation.contingency_table is None else evaluation.contingency_table.numpy(),
        class_names=images.class_names,
        metrics_file=folder / "metrics.csv",
        config_text=config_text,
        findings=findings,
        drawers=drawers,
        samples=evaluation.samples,
        **pictures_of_findings,
    )
    return clusters


def find_pictures(images: ImageSet) -> ImageSource | None:
    """Return the pictures of the evaluation images: those given with them, if any, else the images themselves."""
    is_vectors = images.evaluation.shape[:2] == (1, 1)
    return images.pictures if is_vectors or images.pictures is not None else images.evaluation
