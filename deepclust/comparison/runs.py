"""Finished runs, read from their folders."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

IDENTITY = ("dataset", "method", "backbone", "num_clusters", "epochs")


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
    except ValueError as error:
        return f"results.json cannot be read: {error}"
    if not isinstance(results, dict) or results.get("format") != 1:
        return "results.json is not of format 1"
    lacking = [key for key in (*IDENTITY, "seed", "scores", "timing") if key not in results]
    if lacking:
        return f"results.json lacks {', '.join(lacking)}"
    # Hydra's own file is written anew by every start, also by one that is refused.
    said = results.get("overrides")
    texts = said if isinstance(said, list) else written_overrides(folder / ".hydra" / "overrides.yaml")
    pairs = (str(text).lstrip("+").partition("=") for text in texts)
    return Run(name, results, {key: value for key, _, value in pairs})


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
    texts = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(texts, list)  # Hydra writes nothing else
    return texts
