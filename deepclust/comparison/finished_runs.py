"""Finished runs, read from their folders."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

IDENTITY = ("dataset", "method", "backbone", "num_clusters", "epochs")
METRICS = ("acc", "nmi", "ari")
KINDS = {"dataset": str, "method": str, "backbone": str, "num_clusters": int, "epochs": int, "seed": int}


@dataclass(frozen=True)
class Run:
    """A finished run: its folder below the searched one, its results.json, its overrides by key."""

    folder: str
    results: dict
    overrides: dict[str, str]


def run_folders(top: Path) -> Iterator[Path]:
    """The run folders below `top`, itself included. What lies in a run folder, such as the stage before it, is part of
    that run and no run of its own."""
    for path, folders, files in os.walk(top):
        folder = Path(path)
        if "results.json" in files or (folder / ".hydra" / "config.yaml").is_file():
            yield folder
            folders.clear()
        folders[:] = sorted(f for f in folders if not f.startswith("."))


def load(folder: Path, *, name: str) -> Run | str:
    """The finished run in `folder`, or why there is none."""
    file = folder / "results.json"
    if not file.is_file():
        return "; ".join(["unfinished: no results.json", *_last_words(folder)])
    try:
        results = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        return f"results.json cannot be read: {error}"
    if not isinstance(results, dict) or results.get("format") != 1:
        return "results.json is not of format 1"
    lacking = [key for key in (*IDENTITY, "seed", "scores", "timing") if key not in results]
    if lacking:
        return f"results.json lacks {', '.join(lacking)}"
    if odd := [key for key in results if not _fits(key, results[key])]:
        return f"results.json holds something else than expected as {', '.join(odd)}"
    try:
        # Hydra's own file is written anew by every start, also by one that is refused.
        said = results.get("overrides")
        texts = said if isinstance(said, list) else written_overrides(folder / ".hydra" / "overrides.yaml")
    except (ValueError, OSError, yaml.YAMLError) as error:
        return f".hydra/overrides.yaml cannot be read: {' '.join(str(error).split())}"
    pairs = (str(text).lstrip("+").partition("=") for text in texts)
    return Run(name, results, {key: value for key, _, value in pairs})


def _fits(key: str, value: Any) -> bool:
    """Whether results.json may hold this value by this key, as far as the table reads it."""
    if key in KINDS:
        return isinstance(value, KINDS[key])
    if value is None or key not in ("scores", "baseline", "timing"):
        return True
    if not isinstance(value, dict):
        return False
    if key == "timing":
        return all(isinstance(value.get(name) or 0, int | float) for name in ("train_seconds", "earlier_seconds"))
    return all(
        isinstance(rule, dict) and all(isinstance(rule.get(metric), int | float) for metric in METRICS)
        for rule in value.values()
        if rule is not None
    )


def _last_words(folder: Path) -> Iterator[str]:
    """What an unfinished run left about its end."""
    for name in ("status.json", "error.txt"):
        if (folder / name).is_file():
            text = " ".join((folder / name).read_text(errors="replace").split())
            yield f"{name}: {text[-200:]}"  # a traceback says the most at its end


def written_overrides(file: Path) -> list:
    """What Hydra has written of the overrides."""
    if not file.is_file():
        return []
    texts = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(texts, list):
        raise ValueError("it holds no list")
    return texts
