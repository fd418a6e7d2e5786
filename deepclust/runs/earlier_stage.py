"""Methods with stages: the stage before a run is found or run first, and the run records what it starts from."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from deepclust.engine import distributed
from deepclust.errors import InputError
from deepclust.runs.checkpoint import compute_checksum, load_checkpoint
from deepclust.runs.results import read_results

log = logging.getLogger(__name__)


def find_earlier_run(
    cfg: DictConfig, folder: Path, *, run_stage: Callable[[DictConfig, Path], dict[str, Any]]
) -> dict[str, Any] | None:
    """Describe the run that this one starts from: `cfg.start`, else the stage before it, else None.

    The stage before is run first, by `run_stage(cfg, folder)` in the folder `before` of this run, unless it is there.

    Raises:
        InputError: if `cfg.start` is no finished run.
    """
    if cfg.start is not None:
        return describe_earlier_run(Path(cfg.start))
    if cfg.before is None:
        return None
    stage_folder = folder / "before"
    if read_results(stage_folder) is None:
        stage_folder.mkdir(exist_ok=True)
        stage_cfg = configure_earlier_stage(cfg)
        log.info("first the stage before: %s in %s", stage_cfg.names.method, stage_folder)
        run_stage(stage_cfg, stage_folder)
        distributed.barrier()  # until the first process has written what is read next
    return describe_earlier_run(stage_folder)


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
