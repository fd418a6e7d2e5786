"""The end of a run on the dashboards that its loggers feed: scores, clusters as pictures, the contingency table."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from deepclust.report.cluster_pictures import STRIPS, Picture, Sheet
from deepclust.report.heatmap import matching
from deepclust.report.html_fragments import class_name

log = logging.getLogger(__name__)
MOST_CLUSTERS = 50  # that get a picture, the largest first
CELL = 64  # pixels of an image on a sheet
ACROSS = 8  # images in a row of it
GAP = 8  # pixels between its strips
SHADE = 16  # pixels of a cell of the contingency table


def send_to_dashboards(
    loggers: Sequence[Logger],
    results: dict[str, Any],
    sheets: Sequence[Sheet],
    table: np.ndarray | None,
    class_names: Sequence[str] | None,
) -> None:
    """Log final scores and health as `final/...`, a picture of each cluster, and the table (C, K) of counts.

    Then the run on the hosted service is closed, so that the next job of a sweep gets one of its own. What goes wrong
    here is said and never ends the run.
    """
    scored = {**results["scores"], **results.get("baseline", {})}
    scores = {f"final/{rule}/{m}": v for rule, s in scored.items() for m, v in (s or {}).items()}
    scores |= {f"final/{name}": float(value) for name, value in results["health"].items()}
    pictures = {
        f"clusters/{sheet['cluster']:03d}": (picture, f"{sheet['size']} images, from the top: {', '.join(STRIPS)}")
        for sheet in sheets[:MOST_CLUSTERS]
        if (picture := tile([sheet["typical"], sheet["random"], sheet["uncertain"]])) is not None
    }
    for logger in loggers:
        try:
            if isinstance(logger, WandbLogger):
                _send_to_wandb(logger.experiment, scores, pictures, table, class_names)
            elif isinstance(logger, TensorBoardLogger):
                _send_to_tensorboard(logger.experiment, scores, pictures, table, results["steps"])
        except Exception as error:
            log.warning("the dashboard lacks some of the end of this run (%s)", str(error).partition("\n")[0])


def _send_to_wandb(
    run: Any,
    scores: dict[str, float],
    pictures: dict[str, tuple[np.ndarray, str]],
    table: np.ndarray | None,
    class_names: Sequence[str] | None,
) -> None:
    import wandb

    try:
        run.summary.update(scores)
        run.log({name: wandb.Image(picture, caption=caption) for name, (picture, caption) in pictures.items()})
        if table is not None:  # last, for it asks the service and fails where the network went during the run
            names = [class_name(c, class_names) for c in range(len(table))]
            rows = [[cluster, *counts] for cluster, counts in enumerate(table.T.tolist())]
            run.log({"contingency": wandb.Table(columns=["cluster", *names], data=rows)})
    finally:
        run.finish()


def _send_to_tensorboard(
    writer: Any,
    scores: dict[str, float],
    pictures: dict[str, tuple[np.ndarray, str]],
    table: np.ndarray | None,
    step: int,
) -> None:
    for name, value in scores.items():
        writer.add_scalar(name, value, step)
    for name, (picture, _) in pictures.items():
        writer.add_image(name, picture, step, dataformats="HWC")
    if table is not None:
        writer.add_image("contingency", shaded(table), step, dataformats="HWC")
    writer.flush()


def tile(strips: Sequence[Sequence[Picture]]) -> np.ndarray | None:
    """Strips of pictures below each other, uint8 (H, W, 3), every picture brought to about `CELL` pixels; or None."""
    if not any(strips):
        return None
    heights = [math.ceil(len(strip) / ACROSS) * CELL + GAP for strip in strips]
    canvas = np.full((sum(heights) - GAP, CELL * min(ACROSS, max(map(len, strips))), 3), 255, np.uint8)
    for top, strip in zip(np.cumsum([0, *heights]).tolist(), strips, strict=False):
        for at, picture in enumerate(strip):
            height, width = picture.pixels.shape[:2]
            rows, columns = np.arange(CELL) * height // CELL, np.arange(CELL) * width // CELL
            row, column = divmod(at, ACROSS)
            canvas[top + row * CELL :, column * CELL :][:CELL, :CELL] = picture.pixels[rows][:, columns]
    return canvas


def shaded(table: np.ndarray) -> np.ndarray:
    """The table (C, K) with clusters as rows in the order of their classes, uint8 (H, W, 3): the darker, the more."""
    counts = table.T[np.argsort(matching(table), kind="stable")]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    grey = np.round(255 * (1 - shares)).astype(np.uint8).repeat(SHADE, 0).repeat(SHADE, 1)
    return np.stack([grey] * 3, 2)
