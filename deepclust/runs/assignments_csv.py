"""assignments.csv: the cluster of every image, written and read."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from deepclust.engine.csv_cells import path_cell
from deepclust.engine.output_files import replace_text_file
from deepclust.errors import InputError
from deepclust.runs.run_folder import ASSIGNMENTS


def write_assignments(
    folder: Path,
    assignments: Tensor,
    confidence: Tensor,
    *,
    labels: Any | None = None,
    paths: list[str] | None = None,
    more_columns: Mapping[str, list[Any]] | None = None,
) -> None:
    """Write one line an image: index, cluster, confidence and, where they are known, label and path.

    `assignments` and `confidence` are (M,), in the order of the data set. `more_columns` follow by their names.
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
    columns |= more_columns or {}
    with replace_text_file(folder / ASSIGNMENTS) as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def read_assignments(folder: Path) -> dict[str, list[Any]]:
    """Read the columns cluster, confidence and, where they are there, label and path from a run folder.

    Raises:
        InputError: if the file is missing, or is not as deepclust wrote it.
    """
    types: dict[str, Any] = {"cluster": to_int64, "confidence": float, "label": to_int64, "path": str}
    try:
        with (folder / ASSIGNMENTS).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        names = [name for name in types if name in rows[0] or name in ("cluster", "confidence")]
        return {name: [types[name](row[name]) for row in rows] for name in names}
    except (OSError, LookupError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"{folder / ASSIGNMENTS} cannot be read: {' '.join(str(error).split()) or type(error).__name__}",
            expected="the assignments of a finished run",
            do="bring back a copy, or train again in another folder (hydra.run.dir=DIR)",
        ) from error


def to_int64(text: str) -> int:
    """Return the integer that a text stands for.

    Raises:
        ValueError: if it is none, or does not fit into 64 bits.
    """
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{text[:40]} has more than 64 bits")
    return value
