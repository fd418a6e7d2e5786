"""What the processes of a run do when one of them fails, is killed or hangs: all end, and one line says which it was.

A process that fails says so to the others through torch's store, and ends once they have heard it. A process whose
communication breaks calls the roll: who neither answers nor listens was killed or hangs. Both are bounded by
ROLL_CALL_SECONDS.
"""

import ctypes
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deepclust.engine.worker_processes import PR_SET_PDEATHSIG
from deepclust.errors import ProcessLost
from deepclust.exit_codes import PROCESS_LOST, exit_code_of_error

ROLL_CALL_SECONDS = 10.0  # a process that computes on a busy machine must be able to answer
SECONDS_BETWEEN_LOOKS = 0.5  # of a process that listens
GLOO_OTHER_TIMED_OUT = "Application timeout caused pair closure"

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
    roll = RollCall(next(_runs))
    try:
        yield
    except Exception as error:
        answers = roll.call(PROCESS_LOST if is_of_communication(error) else exit_code_of_error(error))
        if answers is None or not is_of_communication(error):
            raise
        codes, silent = answers
        told = {rank: code for rank, code in codes.items() if code != PROCESS_LOST}
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
            end = "does not answer" if is_of_time_out(error) else "was killed or hangs"
            raise ProcessLost(
                f"{name_processes(silent)} {end}", do=f"to go on: {going_on}", exit_code=PROCESS_LOST
            ) from error
        raise  # all are there: the error is one of communication itself
    finally:
        roll.stop_listening()
        wait_for_gloo_threads()


def name_processes(ranks: list[int]) -> str:
    """Return the words for some processes of a run, such as "the process of rank 1"."""
    return f"the process of rank {ranks[0]}" if len(ranks) == 1 else f"each process of the ranks {ranks}"


def is_of_communication(error: Exception) -> bool:
    """Return whether an error says that processes cannot reach each other; gloo has no class of its own for that.

    Gloo's messages name its file, but for the one of an operation that ends because another has timed out.
    """
    from torch import distributed as dist

    is_of_gloo = "/gloo/" in str(error) or GLOO_OTHER_TIMED_OUT in str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and is_of_gloo)


def is_of_time_out(error: Exception) -> bool:
    """Return whether an error of communication says that another process did not answer in time."""
    return "timed out" in str(error).lower() or GLOO_OTHER_TIMED_OUT in str(error)


class RollCall:
    """What the processes of a run tell each other through torch's store, when one of them ends with an error.

    Each listens all the time. When a connection breaks it may be too late: the store has gone with the process that
    holds it.
    """

    def __init__(self, run: int) -> None:
        self.run = run
        self.codes: dict[int, int] = {}  # the exit codes that were told, by rank
        self.listening: set[int] = set()  # the ranks of those that have heard of one
        self.is_over = threading.Event()
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()

    def call(self, exit_code: int) -> tuple[dict[int, int], list[int]] | None:
        """Tell the others how this process ends; return the exit codes of all that have told, and who is silent.

        None is returned where there are no others.
        """
        if not has_others():
            return None
        from torch import distributed as dist

        self.codes[dist.get_rank()] = exit_code
        # A store whose process is stopped never answers.
        asking = threading.Thread(target=self.tell_and_ask, daemon=True)
        asking.start()
        asking.join(ROLL_CALL_SECONDS + 5)
        return dict(sorted(self.codes.copy().items())), self.list_silent()

    def listen(self) -> None:
        """Read what the others tell until this process ends, and say when there is something."""
        with suppress(RuntimeError, ValueError):  # the store is gone, with the process that holds it, or the group is
            while not self.is_over.wait(SECONDS_BETWEEN_LOOKS):
                if has_others():
                    self.read(get_store())

    def stop_listening(self) -> None:
        """Let the thread that listens end: the interpreter aborts where it ends while a thread asks the store.

        A store whose process is stopped never answers; so the wait is bounded.
        """
        self.is_over.set()
        self.listener.join(ROLL_CALL_SECONDS)

    def tell_and_ask(self) -> None:
        """Tell the others how this process ends, and wait until they have heard it."""
        from torch import distributed as dist

        with suppress(RuntimeError):  # the store is gone, with the process that holds it
            store, rank = get_store(), dist.get_rank()
            store.set(self.key("exit code", rank), str(self.codes[rank]))
            deadline = time.monotonic() + ROLL_CALL_SECONDS
            while self.list_silent() and time.monotonic() < deadline:
                self.read(store)
                time.sleep(0.05)
            if PROCESS_LOST in self.codes.values():
                time.sleep(1)  # the process that holds the store may not be the first to leave

    def read(self, store: Any) -> None:
        """Read which exit codes were told and who has heard of one; say that this process has."""
        from torch import distributed as dist

        for other in range(dist.get_world_size()):
            if other not in self.codes and store.check([self.key("exit code", other)]):
                self.codes[other] = int(store.get(self.key("exit code", other)))
            if other not in self.listening and store.check([self.key("listening", other)]):
                self.listening.add(other)
        if self.codes and dist.get_rank() not in self.listening:
            store.set(self.key("listening", dist.get_rank()), "")

    def list_silent(self) -> list[int]:
        """Return the ranks of those that have neither told an exit code nor heard of one."""
        from torch import distributed as dist

        return [rank for rank in range(dist.get_world_size()) if rank not in self.codes.keys() | self.listening]

    def key(self, what: str, rank: int) -> str:
        return f"deepclust/{self.run}/{what}/{rank}"


def has_others() -> bool:
    """Return whether this process has joined others."""
    from torch import distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def get_store() -> Any:
    """Return the store of the processes, to which torch has no public way."""
    from torch import distributed as dist

    return dist.distributed_c10d._get_default_store()


def wait_for_gloo_threads() -> None:
    """Wait until gloo's threads have let go of the tensors that they sent, at most ROLL_CALL_SECONDS.

    A thread may still hold one when everybody has what was sent. Where the interpreter ends before such a thread gets
    the processor again, it aborts (pytorch/pytorch#179291): a run that has ended well would end with SIGABRT.
    """
    deadline, num_idle_looks = time.monotonic() + ROLL_CALL_SECONDS, 0
    while num_idle_looks < 2 and time.monotonic() < deadline:  # a thread that waits for Python's lock is idle once
        num_idle_looks = num_idle_looks + 1 if "R" not in list_gloo_thread_states() else 0
        time.sleep(0.01)


def list_gloo_thread_states() -> list[str]:
    """Return the state of each thread of gloo that works on what is sent, as /proc names it; [] without /proc."""
    states = []
    for task in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):  # the thread has ended
            name, _, state = task.read_text().partition("(")[2].rpartition(") ")
            if name == "pt_gloo_runloop":
                states.append(state[0])
    return states


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
