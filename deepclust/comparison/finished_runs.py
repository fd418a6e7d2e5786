"""Finished runs, read from their folders."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepclust.engine.small_files import is_finite_number, read_json, read_small_text, read_yaml
from deepclust.score_names import SCORE_NAMES

# Of results.json; runs of a group agree in them, and those that end by themselves in max_epochs and not in epochs
IDENTITY_KEYS = ("dataset", "method", "backbone", "num_clusters", "epochs")
EXPECTED_TYPES = {"dataset": str, "method": str, "backbone": str, "num_clusters": int}
EXPECTED_TYPES |= {"epochs": int, "max_epochs": int, "seed": int}


@dataclass(frozen=True)
class FinishedRun:
    """A finished run."""

    folder: str  # relative to the searched folder
    results: dict  # the content of results.json
    overrides: dict[str, str]  # by key


def find_run_folders(root: Path) -> Iterator[Path]:
    """Yield the run folders below `root`, or `root` itself if it is one.

    A run folder is not searched: a run inside of it, such as an earlier stage, is part of that run.
    """
    for path, subfolders, files in os.walk(root):
        folder = Path(path)
        if "results.json" in files or (folder / ".hydra" / "config.yaml").is_file():
            yield folder
            subfolders.clear()
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))


def read_finished_run(folder: Path, *, name: str) -> FinishedRun | str:
    """Return the finished run in `folder` or, if there is none, the reason as text."""
    file = folder / "results.json"
    if not file.exists():
        return "; ".join(["unfinished: no results.json", *_describe_end(folder)])
    try:
        results = read_json(file)
    except (ValueError, OSError) as error:
        return f"results.json cannot be read: {error}"
    if not isinstance(results, dict) or results.get("format") != 1:
        return "results.json is not of format 1"
    missing = [key for key in (*IDENTITY_KEYS, "seed", "scores", "timing") if key not in results]
    if missing:
        return f"results.json lacks {', '.join(missing)}"
    if invalid := [key for key in results if not _has_expected_type(key, results[key])]:
        return f"results.json has an unexpected value of {', '.join(invalid)}"
    try:
        # results.json is preferred: Hydra writes its file anew at each start in the folder, even if the run is refused.
        overrides = results.get("overrides")
        if not isinstance(overrides, list):
            overrides = read_overrides(folder / ".hydra" / "overrides.yaml")
    except (ValueError, OSError) as error:
        return f".hydra/overrides.yaml cannot be read: {error}"
    pairs = (str(override).lstrip("+").partition("=") for override in overrides)
    return FinishedRun(name, results, {key: value for key, _, value in pairs})


def _has_expected_type(key: str, value: Any) -> bool:
    """Return whether an entry of results.json has the form that the table needs; other entries may have any form."""
    if key in EXPECTED_TYPES:
        return isinstance(value, EXPECTED_TYPES[key])
    if value is None or key not in ("scores", "baseline", "timing"):
        return True
    if not isinstance(value, dict):
        return False
    if key == "timing":
        return all(is_finite_number(value.get(name) or 0) for name in ("train_seconds", "earlier_seconds"))
    return all(
        isinstance(scores, dict) and all(is_finite_number(scores.get(metric)) for metric in SCORE_NAMES)
        for scores in value.values()
        if scores is not None
    )


def _describe_end(folder: Path) -> Iterator[str]:
    """Yield what an unfinished run has written about how it ended."""
    for name in ("status.json", "error.txt"):
        if (folder / name).exists():
            try:
                text = " ".join(read_small_text(folder / name, errors="replace").split())
            except (ValueError, OSError) as error:
                text = f"cannot be read: {error}"
            yield f"{name}: {text[-200:]}"  # the last lines of a traceback say the most


def read_overrides(file: Path) -> list:
    """Return the overrides that Hydra has written to a file; none if there is no file.

    Raises:
        ValueError: if the file does not hold a list.
        OSError: if the system refuses to read it.
    """
    if not file.exists():
        return []
    overrides = read_yaml(file)
    if not isinstance(overrides, list):
        raise ValueError("it does not hold a list")
    return overrides
