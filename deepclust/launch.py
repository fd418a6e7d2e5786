"""Starts the processes of one run.

Lightning would start the other ranks by running the command line again, `-m` and all, and each would sweep for itself
with its own parameters. So the processes are started here, every one with the same resolved configuration, and
Lightning finds itself inside a ready group.
"""

import ctypes
import os
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from deepclust.errors import InputError

Work = Callable[[DictConfig, Path], dict[str, Any]]
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's numbers for them


def keep_freed_memory() -> None:
    """Let the C library keep what tensors give back, to be used again: from the system it comes page by page, zeroed.

    Without, glibc gives back the activations of some steps and not of others (docs/performance.md has what that costs).
    Nothing is done with another C library, or where the environment has settings for this one.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(MMAP_THRESHOLD, 2**25)  # bytes; the most that every version takes
    mallopt(TRIM_THRESHOLD, 2**31 - 1)


def run(work: Work, cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """`work(cfg, folder)` on as many processes as the hardware asks for; the result of rank 0.

    Raises:
        InputError: where several devices would be left to Lightning's strategy, which sends buffers around.
    """
    devices = count_devices(cfg.hardware.accelerator, cfg.hardware.devices)
    cfg.hardware.devices = devices
    if devices > 1 and cfg.hardware.strategy == "auto":
        raise InputError(
            f"hardware.devices is {devices}, and this hardware is for one",
            expected="hardware=ddp or hardware=slurm for several",
            do=f"set hardware=ddp hardware.devices={devices}, and hardware.precision and so on as wanted",
        )
    if processes_exist():
        check_processes(devices, cfg.hardware.num_nodes)
    if devices == 1 or processes_exist():
        return work(cfg, folder)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from deepclust.stopping import SIGNALS, pass_on, put_back

    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        start_method="spawn",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in before),  # handed on to the processes
    )
    try:
        results = elastic_launch(config, _worker)(work, OmegaConf.to_yaml(cfg), str(folder))
    except SignalException as stopped:
        pass_on(before[stopped.sigval], signal.Signals(stopped.sigval))
        sys.exit(128 + stopped.sigval)
    finally:
        put_back(before)
    for result in results.values():
        if isinstance(result, InputError):
            raise result
    return results[0]


def processes_exist() -> bool:
    """Whether this process is one of several that torchrun or Slurm's srun started."""
    srun = "SLURM_STEP_ID" in os.environ  # a batch script has the number of tasks too, and is alone
    several = int(os.environ.get("SLURM_NTASKS", 1)) > 1
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "TORCHELASTIC_RUN_ID" in os.environ or (srun and several and not interactive)


def check_processes(devices: int, num_nodes: int) -> None:
    """See that torchrun or srun has started a process for each device.

    Raises:
        InputError: where it has not, or srun was not told how many of them share a node.
    """
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE"))
    everywhere = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS"))
    if (here, everywhere) != (str(devices), str(devices * num_nodes)):
        raise InputError(
            f"{everywhere} processes were started, {here or 'an unknown number'} a node, and hardware asks for "
            f"{num_nodes} x {devices}",
            expected="a process for each device",
            do="choose hardware=slurm and start it by srun --nodes=M --ntasks-per-node=N, or set hardware.num_nodes=M "
            "hardware.devices=N",
        )


def rank() -> int:
    """This process's number among those that torchrun or srun started, from 0; known before they have met."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) if processes_exist() else 0


def count_devices(accelerator: str, devices: int | str) -> int:
    """How many devices `hardware` means on this machine."""
    if devices != "auto":
        return int(devices)
    import torch

    return max(torch.cuda.device_count(), 1) if accelerator in ("auto", "gpu", "cuda") else 1


def _worker(work: Work, config: str, folder: str) -> Any:
    keep_freed_memory()
    cfg = OmegaConf.create(config)
    assert isinstance(cfg, DictConfig)
    try:
        return work(cfg, Path(folder))
    except InputError as error:
        return error  # an exception would come back as a report on the process, not as itself
