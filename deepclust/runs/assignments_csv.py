"""assignments.csv: the cluster of every image, written and read."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deepclust.engine.csv_cells import path_cell
from deepclust.engine.output_files import replace_text_file
from deepclust.runs.folder import ASSIGNMENTS


def write_assignments(
    folder: Path,
    assignments: Tensor,
    confidence: Tensor,
    *,
    labels: Any | None = None,
    paths: list[str] | None = None,
) -> None:
    """Write one line an image: index, cluster, confidence and, where they are known, label and path.

    `assignments` and `confidence` are (M,), in the order of the data set.
    """
    columns: dict[str, Any] = {
        "index": range(len(assignments)),
        "cluster": assignments.tolist(),
        "confidence": [f"{c:.6f}" for c in confidence.tolist()],
    }
    if labels is not None:
        columns["label"] = labels.tolist()
    if paths is not None:
        columns["path"] = [path_cell(path) for path in paths]
    with replace_text_file(folder / ASSIGNMENTS) as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def read_clusters(folder: Path) -> np.ndarray:
    """Read the cluster of each image (M,) from a run folder."""
    with (folder / ASSIGNMENTS).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return np.array([int(row["cluster"]) for row in csv.DictReader(file)])
