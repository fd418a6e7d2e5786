"""The end of a run on the dashboards of its loggers: scores, clusters as pictures and the contingency table."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from deepclust.report.cluster_pictures import LIST_TITLES, ClusterPictures, Picture
from deepclust.report.generated_images import arrange_samples, describe_samples
from deepclust.report.heatmap import match_clusters_to_classes
from deepclust.report.html_fragments import class_name

log = logging.getLogger(__name__)
MAX_CLUSTERS = 50  # that are sent as pictures, the largest first
PICTURE_SIDE = 64  # pixels of an image in the picture of a cluster
PICTURES_PER_ROW = 8
LIST_GAP = 8  # pixels between the lists of a cluster
CELL_SIDE = 16  # pixels of a cell of the contingency table


def send_to_dashboards(
    loggers: Sequence[Logger],
    results: dict[str, Any],
    clusters: Sequence[ClusterPictures],
    contingency_table: np.ndarray | None,
    class_names: Sequence[str] | None,
    *,
    samples: np.ndarray | None = None,
) -> None:
    """Log final scores, health, objective and time, a picture of each cluster, and the contingency table (C, K).

    `samples`, generated images of each cluster (K, S, H, W, channels), are logged as the picture `generated`. Then the
    run of Weights & Biases is closed, so that the next job of a sweep gets its own. An error is logged as a warning and
    does not end the run.
    """
    scores_by_rule = {**results["scores"], **results.get("baseline", {})}
    values = {
        f"final/{rule}/{m}": value for rule, scores in scores_by_rule.items() for m, value in (scores or {}).items()
    }
    values |= {f"final/{name}": float(value) for name, value in results["health"].items()}
    if (timing := results.get("timing")) is not None:  # with earlier stages, as `deepclust compare` counts them
        values["final/minutes"] = (timing["train_seconds"] + (timing.get("earlier_seconds") or 0.0)) / 60
    if objective := results.get("objective"):
        values[objective["name"]] = objective["value"]  # by which a sweep of the dashboard searches
    pictures = {
        f"clusters/{cluster.cluster:03d}": (picture, f"{cluster.size} images, from the top: {', '.join(LIST_TITLES)}")
        for cluster in clusters[:MAX_CLUSTERS]
        if (picture := arrange_pictures(cluster.lists)) is not None
    }
    if samples is not None:
        pictures["generated"] = arrange_samples(samples), describe_samples(samples)
    for logger in loggers:
        try:
            if isinstance(logger, WandbLogger):
                _send_to_wandb(logger.experiment, values, pictures, contingency_table, class_names)
            elif isinstance(logger, TensorBoardLogger):
                _send_to_tensorboard(logger.experiment, values, pictures, contingency_table, results["steps"])
        except Exception as error:
            log.warning("the dashboard lacks a part of the final results (%s)", str(error).partition("\n")[0])


def _send_to_wandb(
    run: Any,
    values: dict[str, float],
    pictures: dict[str, tuple[np.ndarray, str]],
    contingency_table: np.ndarray | None,
    class_names: Sequence[str] | None,
) -> None:
    import wandb

    try:
        run.summary.update(values)
        run.log({name: wandb.Image(picture, caption=caption) for name, (picture, caption) in pictures.items()})
        # The table comes last: it needs the network, which may have gone during the run, and fails without it.
        if contingency_table is not None:
            names = [class_name(c, class_names) for c in range(len(contingency_table))]
            rows = [[cluster, *counts] for cluster, counts in enumerate(contingency_table.T.tolist())]
            run.log({"contingency": wandb.Table(columns=["cluster", *names], data=rows)})
    finally:
        run.finish()


def _send_to_tensorboard(
    writer: Any,
    values: dict[str, float],
    pictures: dict[str, tuple[np.ndarray, str]],
    contingency_table: np.ndarray | None,
    step: int,
) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    for name, (picture, _) in pictures.items():
        writer.add_image(name, picture, step, dataformats="HWC")
    if contingency_table is not None:
        writer.add_image("contingency", draw_contingency_table(contingency_table), step, dataformats="HWC")
    writer.flush()


def arrange_pictures(lists: Sequence[Sequence[Picture]]) -> np.ndarray | None:
    """Return lists of pictures below each other as one picture, uint8 (H, W, 3); None if all lists are empty.

    Every picture is scaled to a square of PICTURE_SIDE pixels.
    """
    if not any(lists):
        return None
    heights = [math.ceil(len(pictures) / PICTURES_PER_ROW) * PICTURE_SIDE + LIST_GAP for pictures in lists]
    width = PICTURE_SIDE * min(PICTURES_PER_ROW, max(map(len, lists)))
    canvas = np.full((sum(heights) - LIST_GAP, width, 3), 255, np.uint8)
    for top, pictures in zip(np.cumsum([0, *heights]).tolist(), lists, strict=False):
        for index, picture in enumerate(pictures):
            height, width = picture.pixels.shape[:2]
            rows = np.arange(PICTURE_SIDE) * height // PICTURE_SIDE  # nearest pixels
            columns = np.arange(PICTURE_SIDE) * width // PICTURE_SIDE
            row, column = divmod(index, PICTURES_PER_ROW)
            y, x = top + row * PICTURE_SIDE, column * PICTURE_SIDE
            canvas[y : y + PICTURE_SIDE, x : x + PICTURE_SIDE] = picture.pixels[rows][:, columns]
    return canvas


def draw_contingency_table(contingency_table: np.ndarray) -> np.ndarray:
    """Return counts (C, K) as a grey picture, uint8 (H, W, 3): the larger the share of a cluster, the darker.

    Clusters are rows in the order of their matched classes; classes are columns.
    """
    counts = contingency_table.T[np.argsort(match_clusters_to_classes(contingency_table), kind="stable")]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    grey = np.round(255 * (1 - shares)).astype(np.uint8).repeat(CELL_SIDE, 0).repeat(CELL_SIDE, 1)
    return np.stack([grey] * 3, 2)
