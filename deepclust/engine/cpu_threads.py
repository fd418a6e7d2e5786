"""How many threads torch computes with on the CPU.

The number changes the order of sums, and with it the last bits of a result. So it follows from the run and the machine,
never from how busy the machine is at the moment: the same seed gives the same result whenever it is started.
docs/performance.md has what was measured.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deepclust.engine.plurals import format_count

log = logging.getLogger(__name__)

# A batch of up to so many values is computed in one thread. Its steps take milliseconds, in which several threads would
# mostly wait for each other; on a machine with other work they wait for whole time slices.
MAX_VALUES_FOR_ONE_THREAD = 2**18
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def choose_num_threads(setting: int | str, *, values_in_batch: int, recorded: int | None = None) -> int:
    """Return the number of threads for a training.

    Args:
        setting: a number, or auto.
        values_in_batch: pixels of all views and channels in a batch.
        recorded: what an earlier start of the same training took, which is taken again.
    """
    if setting != "auto":
        return int(setting)
    if any(os.environ.get(name) for name in VARIABLES):
        return torch.get_num_threads()
    if recorded is not None:
        return recorded
    return 1 if values_in_batch <= MAX_VALUES_FOR_ONE_THREAD else torch.get_num_threads()


def describe_num_threads(num_threads: int, setting: int | str) -> str | None:
    """Return what to say of the number that was chosen; None where the user has named it."""
    if setting != "auto" or any(os.environ.get(name) for name in VARIABLES):
        return None
    text = f"training in {format_count(num_threads, 'CPU thread')} (hardware.threads=N takes N)"
    return f"{text}{describe_load()}" if num_threads > 1 else text


def describe_load() -> str:
    """Return a warning if other work takes more than half of the CPUs; empty otherwise."""
    try:
        load = os.getloadavg()[0]
    except OSError:
        return ""
    cpus = os.cpu_count() or 1
    is_busy = load > cpus / 2
    return f"; the machine is busy, load {load:.0f} on {cpus} CPUs, so that fewer may be faster" if is_busy else ""


@contextmanager
def num_threads_set(num_threads: int) -> Iterator[None]:
    """Let torch compute with so many threads inside the `with` block."""
    previous = torch.get_num_threads()
    if num_threads == previous:  # setting even the same number changes how MKL chooses its own
        yield
        return
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
