"""A run folder: the names of its files, and the lock that keeps other processes out of it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepclust.errors import InputError

RESULTS = "results.json"
ASSIGNMENTS = "assignments.csv"
CHECKPOINT = "checkpoints/last.ckpt"
METRICS = "metrics.csv"
REPORT = "report.html"
ERROR = "error.txt"


@contextmanager
def acquire_run_lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder inside the `with` block: two would overwrite each other's files.

    Raises:
        InputError: if another process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process trains in {folder}",
                expected="one at a time",
                do="wait for it, or start in another folder (hydra.run.dir=DIR)",
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
