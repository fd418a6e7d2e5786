"""Methods with stages: the configuration of the stage before a run, and what a run records of the one before it."""

import copy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from deepclust.errors import InputError
from deepclust.runs.checkpoint import compute_checksum, load_checkpoint
from deepclust.runs.results import read_results


def configure_earlier_stage(cfg: DictConfig) -> DictConfig:
    """Return the configuration of the stage before: that of this run with its section `before` laid over it."""
    earlier = copy.deepcopy(cfg)
    with open_dict(earlier):
        before = earlier.pop("before")
        earlier.before = before.pop("before", None)
        earlier.method = before.pop("method")  # as a whole: the two methods have arguments of their own
        earlier.merge_with(before)
    return earlier


def describe_earlier_run(folder: Path) -> dict[str, Any]:
    """Return the section `earlier` of a run that starts from the finished run in `folder`.

    Raises:
        InputError: if `folder` holds no finished run.
    """
    results = read_results(folder)
    if results is None:
        raise InputError(f"{folder} is no finished run", expected="a folder with results.json", do="set start=DIR")
    checkpoint = load_checkpoint(folder)
    return {
        "run": str(folder),
        "method": checkpoint["config"]["method"],
        "sha256": compute_checksum(checkpoint["state_dict"]),
        "train_seconds": results["timing"]["train_seconds"] + results["timing"].get("earlier_seconds", 0.0),
    }
