"""Starts the processes of one run, or uses those that torchrun or Slurm's srun has started.

Lightning would start the other processes by running the command line again. With `-m` each of them would then begin a
sweep of its own, with its own parameters. So the processes are started here, all with the same arguments, and Lightning
finds a ready process group.
"""

import ctypes
import logging
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepclust.engine.lost_processes import (
    ROLL_CALL_SECONDS,
    lost_processes_named,
    name_processes,
    stop_with_parent,
)
from deepclust.errors import InputError, ProcessLost
from deepclust.exit_codes import PROCESS_LOST, exit_code_of_error, exit_code_of_signal, name_signal

log = logging.getLogger(__name__)

ELASTIC_LOGGERS = ("distributed.elastic.multiprocessing.api", "multiprocessing.spawn")
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # options of glibc's mallopt, by their numbers in malloc.h


def run_on_devices(
    work: Callable[..., Any],
    *arguments: Any,
    num_devices: int,
    num_nodes: int,
    strategy_is_auto: bool,
    going_on: str,
) -> Any:
    """Call `work(*arguments)` in one process for each device and return the result of rank 0.

    The arguments must be picklable. Where torchrun or srun has started the processes, each of them calls this. Where
    one process fails, all end. `going_on` is what to type so that a run goes on that has lost a process.

    Raises:
        InputError: if the strategy for several devices is left to Lightning, whose choice broadcasts buffers at every
            step; if the processes that were started do not fit the devices.
        ProcessLost: if a process was killed, or does not answer the others.
        Exception: what `work` raises; of a process that was started here, a RuntimeError with its traceback.
        SystemExit: if a signal has stopped the run, with `exit_code_of_signal`.
    """
    if num_devices > 1 and strategy_is_auto:
        raise InputError(
            f"hardware.devices is {num_devices}, but the chosen hardware file is for one device",
            expected="hardware=ddp or hardware=slurm for several",
            do=f"set hardware=ddp hardware.devices={num_devices}, and other hardware options as needed",
        )
    check_launcher(num_nodes)
    if processes_exist():
        check_processes(num_devices, num_nodes)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # srun's processes end with it, those of torchrun do not
            stop_with_parent()
        with lost_processes_named(going_on=going_on):
            return work(*arguments)
    if num_devices == 1:
        return work(*arguments)
    with tempfile.TemporaryDirectory() as failures:
        return start_processes(work, *arguments, num_processes=num_devices, going_on=going_on, failures=Path(failures))


def start_processes(
    work: Callable[..., Any], *arguments: Any, num_processes: int, going_on: str, failures: Path
) -> Any:
    """Start processes that call `work(*arguments)`, and return the result of rank 0 once all have ended.

    Signals are passed on to them. The empty folder `failures` is where they write why they fail.

    Raises: as `run_on_devices`.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from deepclust.engine.signals import STOP_SIGNALS, call_handler, restore_handlers

    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        start_method="spawn",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in handlers),  # these are passed on to the processes
    )
    try:
        with hide_ended_processes_from_log():
            results = elastic_launch(config, call_in_worker)(failures, going_on, work, *arguments)
    except SignalException as stopped:
        call_handler(handlers[stopped.sigval], signal.Signals(stopped.sigval))
        sys.exit(exit_code_of_signal(stopped.sigval))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        ended_by = find_ending_signal(failure.exitcode)
        number = next((known for known in handlers if known == ended_by), None)
        if number is None:
            name = name_processes([rank])
            raise read_failure(failures / str(rank), name, failure.exitcode, going_on) from None
        log.warning("a process of the run was stopped by %s", number.name)
        call_handler(handlers[number], number)
        sys.exit(exit_code_of_signal(number))
    finally:
        restore_handlers(handlers)
    return results[0]


def write_failure(file: Path, content: InputError | str) -> None:
    """Write down why this process fails, complete or not at all; on a full disk it is printed."""
    unfinished = file.with_suffix(".writing")
    try:
        unfinished.write_bytes(pickle.dumps(content))
        unfinished.rename(file)
    except OSError:
        print(content, file=sys.stderr, flush=True)


def read_failure(file: Path, name: str, exit_code: int, going_on: str) -> Exception:
    """Return the error of the process `name`, from the file that it wrote before it ended, or from its exit code."""
    if file.exists():
        error = pickle.loads(file.read_bytes())  # our own process wrote it a moment ago
        if not isinstance(error, InputError):
            return RuntimeError(f"{name} has failed:\n{error}")
        error.is_printed = None
        return error
    number = find_ending_signal(exit_code)
    end = f"has ended with exit code {exit_code}" if number is None else f"was ended by {name_signal(number)}"
    return ProcessLost(
        f"{name} {end}",
        do=f"to go on: {going_on}",
        exit_code=PROCESS_LOST if number is None else exit_code_of_signal(number),
    )


def find_ending_signal(exit_code: int) -> int | None:
    """Return the number of the signal that ended a process with this exit code, or None.

    It ended the process at once (-number) or after its checkpoint. A process that asks all others to stop has
    `exit_code_of_signal`.
    """
    from deepclust.engine.signals import STOP_SIGNALS

    if exit_code < 0:
        return -exit_code
    return next((number for number in STOP_SIGNALS if exit_code == exit_code_of_signal(number)), None)


@contextmanager
def hide_ended_processes_from_log() -> Iterator[None]:
    """Keep torch from logging tracebacks and warnings about processes that end early: their errors are raised here."""

    def is_unexpected(record: logging.LogRecord) -> bool:
        is_of_an_end = record.getMessage().startswith(("Terminating process", "Closing process"))
        return record.exc_info is None and not is_of_an_end

    loggers = [logging.getLogger(f"torch.{name}") for name in ELASTIC_LOGGERS]
    for logger in loggers:
        logger.addFilter(is_unexpected)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_unexpected)


def call_in_worker(failures: Path, going_on: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work` in a process that `start_processes` has started, and return its result.

    An error is written into the folder `failures`, and the process ends, so that the others cannot wait for it.
    """
    keep_freed_memory()
    stop_with_parent()
    try:
        with lost_processes_named(going_on=going_on):
            return work(*arguments)
    except Exception as error:
        if isinstance(error, ProcessLost):
            time.sleep(ROLL_CALL_SECONDS)  # the process that has failed ends first, and then the others are stopped
        content: InputError | str = (
            error if isinstance(error, InputError) else "".join(traceback.format_exception(error))
        )
        write_failure(failures / os.environ["RANK"], content)
        sys.exit(exit_code_of_error(error))


def processes_exist() -> bool:
    """Return whether this process is one of several that torchrun or Slurm's srun started."""
    is_srun = "SLURM_STEP_ID" in os.environ  # a batch script has SLURM_NTASKS too, but is a single process
    has_several_tasks = int(os.environ.get("SLURM_NTASKS", 1)) > 1
    is_interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "TORCHELASTIC_RUN_ID" in os.environ or (is_srun and has_several_tasks and not is_interactive)


def check_launcher(num_nodes: int, *, key: str = "hardware.num_nodes") -> None:
    """Check that something has started processes on all nodes, where there are several: a run cannot do that itself.

    Raises:
        InputError: if this process is alone; it would wait for the others for ever.
    """
    if num_nodes > 1 and not processes_exist():
        raise InputError(
            f"{key} is {num_nodes}, and neither torchrun nor srun has started this process",
            expected="processes on every node",
            do=f"start the command by srun or torchrun (docs/clusters.md), or set {key}=1",
        )


def check_processes(num_devices: int, num_nodes: int) -> None:
    """Check that torchrun or srun has started a process for each device.

    Raises:
        InputError: if not, or if srun does not say how many processes there are on a node.
    """
    per_node = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE"))
    total = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS"))
    if (per_node, total) != (str(num_devices), str(num_devices * num_nodes)):
        raise InputError(
            f"{total} processes were started, {per_node or 'an unknown number'} per node, but the hardware options ask "
            f"for {num_nodes} nodes x {num_devices} devices",
            expected="one process per device",
            do="choose hardware=slurm and start it by srun --nodes=M --ntasks-per-node=N, or set hardware.num_nodes=M "
            "hardware.devices=N",
        )


def launched_rank() -> int:
    """Return the rank that torchrun or srun has given this process, even before the processes connect; else 0."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) if processes_exist() else 0


def keep_freed_memory() -> None:
    """Make glibc keep the memory that tensors free, instead of returning it to the operating system.

    Memory that was returned comes back zeroed and page by page, which slows steps down; docs/performance.md says by how
    much. Nothing is done with another C library, or if the environment has settings for glibc's malloc.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**25)  # bytes; the largest value that every version accepts
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
