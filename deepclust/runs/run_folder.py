"""A run folder: the names of its files, and the lock that keeps other processes out of it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepclust.engine.run_status import STATUS
from deepclust.engine.worker_processes import LOCKED_DESCRIPTORS
from deepclust.errors import InputError

RESULTS = "results.json"
EARLIER_RESULTS = "results-of-earlier-clusters.json"  # while `deepclust cluster` writes others
ASSIGNMENTS = "assignments.csv"
CHECKPOINT = "checkpoints/last.ckpt"
METRICS_FILE = "metrics.csv"
REPORT = "report.html"
TREE = "tree.npz"  # of methods that find a tree
ERROR = "error.txt"
# of a run that was exported for the Hugging Face Hub; it has no checkpoint
HUB_WEIGHTS = "model.safetensors"
HUB_CONFIG = "config.json"
HUB_CARD = "README.md"


def is_in_hub_form(folder: Path) -> bool:
    """Return whether a folder holds a run as it is on the Hugging Face Hub, without a checkpoint."""
    is_whole = (folder / HUB_CONFIG).exists() and (folder / HUB_WEIGHTS).exists()
    return is_whole and not (folder / CHECKPOINT).exists()


def check_run_files(folder: Path) -> None:
    """Refuse a run folder in which something else has the name of a file that the run writes: it would fail at its end.

    Raises:
        InputError: naming what is in the way.
    """
    for name in (RESULTS, ASSIGNMENTS, CHECKPOINT, METRICS_FILE, REPORT, TREE, STATUS):
        file = folder / name
        if file.exists() and not file.is_file():
            raise InputError(
                f"{file} is a folder" if file.is_dir() else f"{file} is no regular file",
                expected=f"nothing, or the {name} of a run",
                do="remove or rename it, or set hydra.run.dir=DIR",
            )


def check_holds_run(folder: Path, *, key: str = "run") -> None:
    """Refuse a folder that holds no run, as the value of `key`; that of `start` must hold a finished one.

    Raises:
        InputError: naming the key.
    """
    if key == "start":
        if not (folder / RESULTS).exists():
            raise InputError(f"{folder} is no finished run", expected="a folder with results.json", do="set start=DIR")
        return
    path = folder / CHECKPOINT
    if not (path.is_file() or is_in_hub_form(folder)):
        raise InputError(
            f"{folder} holds no {CHECKPOINT}" if not path.exists() else f"{path} is no file",
            expected="the folder of a run",
            do=f"check {key}=DIR",
        )


class RunFolderInUse(InputError):
    """Another process trains in a run folder: nothing may be written there, not even this error."""


@contextmanager
def acquire_run_lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder inside the `with` block: two would overwrite each other's files.

    Raises:
        RunFolderInUse: if another process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    LOCKED_DESCRIPTORS.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderInUse(
                f"another process trains in {folder}",
                expected="one at a time",
                do="wait for it, or start in another folder (hydra.run.dir=DIR)",
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        LOCKED_DESCRIPTORS.discard(descriptor)
        os.close(descriptor)
