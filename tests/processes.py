"""Tests and processes: commands of deepclust, functions on several processes connected by gloo, and shared folders."""

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.multiprocessing import set_forkserver_preload, start_processes

PROGRAM = "from deepclust.cli.main import main; raise SystemExit(main())"
set_forkserver_preload(["lightning", "torchmetrics"])  # imported once, not by every process of `run_on_processes`
TWO_PROCESSES = ["hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2"]


def run_deepclust(*arguments: str, check: bool = True, timeout: float = 400) -> subprocess.CompletedProcess:
    """Run a command of deepclust to its end, for at most `timeout` seconds; with `check` it must succeed."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert not check or completed.returncode == 0, completed.stderr
    return completed


@contextlib.contextmanager
def lock_shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """Hold a folder that all processes of pytest-xdist share, so that only the first of them fills it."""
    parent = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # then the folder of this process lies within that of all
        parent = parent.parent
    (parent / name).mkdir(exist_ok=True)
    with (parent / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield parent / name


def run_on_processes(function, num_processes, folder, *arguments):
    """Call `function(rank, *arguments)` on several processes, and return a list of what each returned."""
    arguments = (function, num_processes, find_free_port(), folder, arguments)
    start_processes(_call_in_process, arguments, nprocs=num_processes, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(num_processes)]


def _call_in_process(rank, function, num_processes, port, folder, arguments):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=num_processes)
    try:
        torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def find_free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]
