"""Starts the processes of one run, or uses those that torchrun or Slurm's srun has started.

Lightning would start the other processes by running the command line again. With `-m` each of them would then begin a
sweep of its own, with its own parameters. So the processes are started here, all with the same arguments, and Lightning
finds a ready process group.
"""

import ctypes
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deepclust.errors import InputError
from deepclust.exit_codes import exit_code_of_signal

log = logging.getLogger(__name__)

ELASTIC_LOGGERS = ("distributed.elastic.multiprocessing.api", "multiprocessing.spawn")
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # options of glibc's mallopt, by their numbers in malloc.h


def run_on_devices(
    work: Callable[..., Any], *arguments: Any, num_devices: int, num_nodes: int, strategy_is_auto: bool
) -> Any:
    """Call `work(*arguments)` in one process for each device and return the result of rank 0.

    The arguments must be picklable. Where torchrun or srun has started the processes, each of them calls this.

    Raises:
        InputError: if the strategy for several devices is left to Lightning, whose choice broadcasts buffers at every
            step; if the processes that were started do not fit the devices.
        Exception: what `work` raises.
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
    if num_devices == 1 or processes_exist():
        return work(*arguments)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from deepclust.engine.signals import STOP_SIGNALS, call_handler, restore_handlers

    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        start_method="spawn",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in handlers),  # these are passed on to the processes
    )
    try:
        with hide_stopped_processes_from_log():
            results = elastic_launch(config, call_in_worker)(work, *arguments)
    except SignalException as stopped:
        call_handler(handlers[stopped.sigval], signal.Signals(stopped.sigval))
        sys.exit(exit_code_of_signal(stopped.sigval))
    except ChildFailedError as failed:
        number = find_stopping_signal(failed.get_first_failure()[1].exitcode)
        if number is None:
            raise
        log.warning("a process of the run was stopped by %s", number.name)
        call_handler(handlers.get(number), number)
        sys.exit(exit_code_of_signal(number))
    finally:
        restore_handlers(handlers)
    for result in results.values():
        if isinstance(result, InputError):
            raise result
    return results[0]


def find_stopping_signal(exit_code: int) -> signal.Signals | None:
    """Return the signal that ended a process with this exit code, at once (-number) or after its checkpoint; or None.

    A process that asks all others to stop has `exit_code_of_signal`.
    """
    from deepclust.engine.signals import STOP_SIGNALS

    if exit_code < 0:
        return signal.Signals(-exit_code)
    return next((number for number in STOP_SIGNALS if exit_code == exit_code_of_signal(number)), None)


@contextmanager
def hide_stopped_processes_from_log() -> Iterator[None]:
    """Keep torch from logging a traceback for each process that a signal has stopped; other failures are logged."""
    from torch.multiprocessing import ProcessExitedException

    def is_unexpected(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ProcessExitedException):
            return find_stopping_signal(error.exit_code) is None
        return not record.getMessage().startswith("Terminating process")

    loggers = [logging.getLogger(f"torch.{name}") for name in ELASTIC_LOGGERS]
    for logger in loggers:
        logger.addFilter(is_unexpected)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_unexpected)


def call_in_worker(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work` in a process that `run_on_devices` has started, and return its result, or the InputError it raised.

    A raised error would reach the calling process as text only.
    """
    keep_freed_memory()
    try:
        return work(*arguments)
    except InputError as error:
        return error


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
