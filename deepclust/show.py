"""What a finished run shows: a small table on the terminal, and its report."""

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from deepclust.callbacks.evaluation import Judge, Judgement
from deepclust.clustering.restarts import dealt_kmeans
from deepclust.datasets.source import ImageSet, ImageSource
from deepclust.report.embedding import embedding_map
from deepclust.report.page import write_report
from deepclust.report.sheets import Sheet, cluster_sheets
from deepclust.run_folder import ASSIGNMENTS

RULES = {
    "pixels": "k-means on pixels",
    "method": "the method's own rule",
    "kmeans": "k-means on its features",
}


def judge_pixels(images: ImageSet, judge: Judge, *, max_values: int) -> dict[str, float] | None:
    """Scores of k-means on the pixels of the evaluation images; None without labels or above `max_values` values."""
    source = images.evaluation
    if images.labels is None or len(source) * int(np.prod(source.shape)) > max_values:
        return None
    pixels = source.read(np.arange(len(source))).flatten(1).float() / 255
    fitted = dealt_kmeans(
        pixels,
        num_clusters=judge.num_clusters,
        metric="euclidean",
        num_restarts=judge.kmeans_restarts,
        max_iterations=judge.kmeans_max_iterations,
        tolerance=judge.kmeans_tolerance,
        key=(judge.seed, "k-means on pixels"),
    )
    return judge.score(fitted.assignments)[0]


def write_run_report(
    folder: Path, results: dict[str, Any], judgement: Judgement, images: ImageSet, cfg: DictConfig
) -> list[Sheet]:
    """report.html of a run; what it shows of each cluster."""
    assignments, confidence = judgement.assignments.numpy(), judgement.confidence.numpy()
    shown = {"source": pictures_of(images), "labels": images.labels, "paths": images.paths, "seed": cfg.seed}
    sheets = cluster_sheets(
        assignments, confidence, class_names=images.class_names, per_cluster=cfg.report.per_cluster, **shown
    )
    embedding = embedding_map(judgement.features, assignments, confidence, max_points=cfg.report.map_points, **shown)
    write_report(
        folder / "report.html",
        results=results,
        sheets=sheets,
        embedding=embedding,
        table=None if judgement.table is None else judgement.table.numpy(),
        class_names=images.class_names,
        curves=folder / "metrics.csv",
        config_text=OmegaConf.to_yaml(cfg, resolve=True),
    )
    return sheets


def pictures_of(images: ImageSet) -> ImageSource | None:
    """What the evaluation images look like; None for vectors without pictures."""
    is_vectors = images.evaluation.shape[:2] == (1, 1)
    return images.pictures if is_vectors else images.evaluation


def show_run(results: dict[str, Any], folder: Path) -> None:
    """Print the scores of a run and where its files lie."""
    table = Table(title=f"{results['method']} on {results['dataset']}, seed {results['seed']}", title_justify="left")
    for column in ("", "ACC", "NMI", "ARI"):
        table.add_column(column, justify="left" if not column else "right")
    scores = {"pixels": results.get("baseline", {}).get("kmeans_on_pixels"), **results["scores"]}
    for rule, title in RULES.items():
        if scores.get(rule):
            table.add_row(title, *(f"{scores[rule][name]:.3f}" for name in ("acc", "nmi", "ari")))
    console = Console()
    if table.row_count:
        console.print(table)
    health, timing = results["health"], results["timing"]
    earlier = timing.get("earlier_seconds", 0.0)
    trained = f"trained {(timing['train_seconds'] + earlier) / 60:.1f} min"
    trained += f", {earlier / 60:.1f} of them before its last stage" if earlier else ""
    console.print(
        f"clusters: {results['num_clusters']}, {health['empty_clusters']:.0f} empty, "
        f"evenness {health['cluster_size_entropy']:.3f} of 1; "
        + trained
        + (f", {timing['images_per_second']:.0f} images/s" if results["steps"] else "")
    )
    for what, name in (("pictures", "report.html"), ("clusters", ASSIGNMENTS), ("scores", "results.json")):
        console.print(f"{what}: {folder / name}", soft_wrap=True, highlight=False)
