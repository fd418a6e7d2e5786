"""Methods with stages: the stage before a run is found or run first, and the run records what it starts from."""

import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from deepclust.config.keys import iterate_entries
from deepclust.engine import distributed
from deepclust.engine.plurals import format_count
from deepclust.errors import InputError
from deepclust.runs.checkpoint import compute_checksum, load_checkpoint
from deepclust.runs.locate_run import locate_run
from deepclust.runs.results import read_results
from deepclust.runs.run_folder import check_holds_run, check_run_files
from deepclust.runs.trusted_targets import list_trusted, open_run_config

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
        return describe_earlier_run(locate_run(cfg.start), trust=list_trusted(cfg))
    if cfg.before is None:
        return None
    stage_folder = folder / "before"
    if read_results(stage_folder) is None:
        stage_folder.mkdir(exist_ok=True)
        check_run_files(stage_folder)
        stage_cfg = configure_earlier_stage(cfg)
        log.info("first the stage before: %s in %s", stage_cfg.names.method, stage_folder)
        warn_of_long_stage(cfg, stage_cfg)
        with name_keys_of_earlier_stage(cfg):
            run_stage(stage_cfg, stage_folder)
        distributed.barrier()  # until the first process has written what is read next
    return describe_earlier_run(stage_folder, trust=list_trusted(cfg))


def warn_of_long_stage(cfg: DictConfig, stage_cfg: DictConfig) -> None:
    """Say that the number of epochs on the command line is not that of the stage before, where that one has more."""
    overrides = cfg.get("overrides") or []
    named = [override for override in overrides if override.lstrip("+").startswith("trainer.max_epochs=")]
    if named and stage_cfg.trainer.max_epochs > cfg.trainer.max_epochs:
        log.warning(
            "%s is for the last stage alone: %s trains for %s, or for as many as before.trainer.max_epochs=N says",
            *(named[0], stage_cfg.names.method, format_count(stage_cfg.trainer.max_epochs, "epoch")),
        )


def configure_earlier_stage(cfg: DictConfig) -> DictConfig:
    """Return the configuration of the stage before: that of this run with its section `before` laid over it."""
    earlier = copy.deepcopy(cfg)
    with open_dict(earlier):
        before = earlier.pop("before")
        earlier.before = before.pop("before", None)
        earlier.method = before.pop("method")  # as a whole: the two methods have arguments of their own
        earlier.merge_with(before)
    return earlier


@contextmanager
def name_keys_of_earlier_stage(cfg: DictConfig) -> Iterator[None]:
    """Let errors of the stage before a run name the keys as they stand in the configuration of the run.

    What stands at `before.batch_size` there is `batch_size` for the stage itself.

    Raises:
        InputError: in place of another one.
    """
    try:
        yield
    except InputError as error:
        entries = iterate_entries(OmegaConf.to_container(cfg.before))
        keys = sorted((key for key, value in entries if not isinstance(value, dict)), key=len, reverse=True)
        # A key that is an English word, too, is only one where a value follows.
        names = [re.escape(key) if "." in key or "_" in key else rf"{re.escape(key)}(?==| is )" for key in keys]
        pattern = re.compile(rf"(?<![\w.])({'|'.join(names)})(?![\w])") if names else None
        parts = [error.what, error.expected, error.do]
        what, expected, do = [pattern.sub(r"before.\1", part) if pattern else part for part in parts]
        renamed = InputError(what, expected=expected, do=do)
        renamed.is_printed = error.is_printed
        raise renamed from error


def describe_earlier_run(folder: Path, *, trust: Iterable[str] = ()) -> dict[str, Any]:
    """Return the section `earlier` of a run that starts from the finished run in `folder`.

    Raises:
        InputError: if `folder` holds no finished run, or one that names code that is not trusted (`open_run_config`):
            the method that starts from it may build that run's method as a part of its own.
    """
    check_holds_run(folder, key="start")
    results = read_results(folder)
    assert results is not None
    checkpoint = load_checkpoint(folder)
    return {
        "run": str(folder),
        "method": OmegaConf.to_container(open_run_config(checkpoint, trust=trust).method),
        "sha256": compute_checksum(checkpoint["state_dict"]),
        "train_seconds": results["timing"]["train_seconds"] + results["timing"].get("earlier_seconds", 0.0),
    }
