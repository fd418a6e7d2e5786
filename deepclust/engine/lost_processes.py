"""What the processes of a run do when one of them fails, is killed or hangs: all end, and one line says which it was.

A process that fails says so to the others through torch's store, and only then ends. A process whose communication
breaks calls the roll: who does not answer was killed or hangs. Both are bounded by ROLL_CALL_SECONDS.
"""

import ctypes
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from deepclust.engine.worker_processes import PR_SET_PDEATHSIG
from deepclust.errors import ProcessLost
from deepclust.exit_codes import PROCESS_LOST, exit_code_of_error

ROLL_CALL_SECONDS = 10.0  # a process that computes on a busy machine must be able to answer

_runs = itertools.count()  # a later run of this process asks under other names


@contextmanager
def lost_processes_named(*, going_on: str) -> Iterator[None]:
    """Turn an error of communication into one that names the process that was lost; all processes enter together.

    Args:
        going_on: what to type so that the run goes on.

    Raises:
        ProcessLost: in place of an error of communication. Its exit code is that with which the other process has
            failed, where it has said so; then it counts as printed, for that process prints its own error.
    """
    run = next(_runs)
    try:
        yield
    except Exception as error:
        answers = call_roll(run, PROCESS_LOST if is_of_communication(error) else exit_code_of_error(error))
        if answers is None or not is_of_communication(error):
            raise
        num_processes, codes = answers
        told = {rank: code for rank, code in codes.items() if code != PROCESS_LOST}
        silent = [rank for rank in range(num_processes) if rank not in codes]
        if told:
            rank, code = next(iter(told.items()))
            lost = ProcessLost(
                f"{name_processes([rank])} has ended with exit code {code}",
                do=f"read its error in error.txt; to go on: {going_on}",
                exit_code=code,
            )
            lost.is_printed = True
            raise lost from error
        if silent:
            end = "does not answer" if "timed out" in str(error).lower() else "was killed or hangs"
            raise ProcessLost(
                f"{name_processes(silent)} {end}", do=f"to go on: {going_on}", exit_code=PROCESS_LOST
            ) from error
        raise  # all are there: the error is one of communication itself


def name_processes(ranks: list[int]) -> str:
    """Return the words for some processes of a run, such as "the process of rank 1"."""
    return f"the process of rank {ranks[0]}" if len(ranks) == 1 else f"each process of the ranks {ranks}"


def is_of_communication(error: Exception) -> bool:
    """Return whether an error says that processes cannot reach each other; gloo has no class of its own for that."""
    from torch import distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def call_roll(run: int, exit_code: int) -> tuple[int, dict[int, int]] | None:
    """Tell the others how this process ends; return the number of processes and the exit codes of those that answer.

    None is returned where there are no others. The connections of gloo are closed where not all answer at once, so that
    those who wait for data of this process learn that none will come.
    """
    import torch
    from torch import distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    store: Any = dist.distributed_c10d._get_default_store()  # there is no public way to it, nor to `abort`
    group: Any = dist.group.WORLD
    gloo = group._get_backend(torch.device("cpu")) if dist.get_backend() == "gloo" else None
    answers = {rank: exit_code}

    def ask(seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while len(answers) < num_processes and time.monotonic() < deadline:
            for other in range(num_processes):
                key = f"deepclust/{run}/exit code/{other}"
                if other not in answers and store.check([key]):
                    answers[other] = int(store.get(key))
            time.sleep(0.05)

    def answer_and_ask() -> None:
        with suppress(RuntimeError):  # the store is gone, with the process that holds it
            store.set(f"deepclust/{run}/exit code/{rank}", str(exit_code))
            ask(1)
            if len(answers) < num_processes:
                if gloo is not None:
                    gloo.abort()
                ask(ROLL_CALL_SECONDS)
            if PROCESS_LOST in answers.values():
                time.sleep(1)  # the process that holds the store may not be the first to leave

    # A store whose process is stopped never answers.
    asking = threading.Thread(target=answer_and_ask, daemon=True)
    asking.start()
    asking.join(ROLL_CALL_SECONDS + 5)
    return num_processes, dict(sorted(answers.copy().items()))


def stop_with_parent() -> None:
    """Send SIGTERM to this process when its parent has ended, be it by SIGKILL: the run saves and stops.

    The system's own signal, which torch sets to SIGINT for the processes that it starts, would save nothing.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    with suppress(OSError, TypeError, AttributeError):  # elsewhere than on Linux there is no such signal
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(0))
    threading.Thread(target=watch, daemon=True).start()
