"""A run that is asked to stop by a signal saves, and goes on from there; real processes get real signals."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback

from tests.runs.test_resume import finish, same, start, uninterrupted  # noqa: F401 (a fixture)

RARELY = ["callbacks.checkpoint.min_seconds=1000", "callbacks.checkpoint.every_n_steps=0"]
LINGER = ["+callbacks.linger._target_=tests.engine.test_signals.Linger", "+callbacks.linger.needs.folder=folder"]
SLOW_START = ["+callbacks.slow._target_=tests.engine.test_signals.SlowStart", "+callbacks.slow.needs.folder=folder"]


class Linger(Callback):
    """Waits after step 10 until it is told to go on."""

    def __init__(self, *, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 10:
            (self.folder / f"here{trainer.global_rank}").touch()
            wait_for(self.folder / "go")


class SlowStart(Linger):
    """An E-step without end."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.global_step > 0:
            (self.folder / f"here{trainer.global_rank}").touch()
            wait_for(self.folder / "never")


def wait_for(*files: Path, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert time.monotonic() < end, files
        time.sleep(0.02)


def stop(process: subprocess.Popen, number: int, folder: Path) -> str:
    """Signal a process that lingers; what it says until it ends."""
    wait_for(folder / "here0")
    process.send_signal(number)
    (folder / "go").touch()
    return process.communicate(timeout=100)[0]


def saved_step(folder: Path) -> int:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_run_goes_on_from_there(uninterrupted, tmp_path, name):  # noqa: F811
    process = start(tmp_path, *RARELY, *LINGER)
    said = stop(process, signal.Signals[name], tmp_path)
    assert process.returncode == 128 + signal.Signals[name]
    assert f"{name}: saved {tmp_path}/checkpoints/last.ckpt at step 10" in said
    assert saved_step(tmp_path) == 10
    finish(tmp_path, *RARELY)
    same(uninterrupted, tmp_path)


def test_the_handler_that_was_there_before_acts_afterwards(tmp_path):
    """As submitit has them: SIGTERM does nothing, SIGUSR2 ends the process; the one that ends it comes first."""
    program = f"""
import pathlib, signal, sys
from deepclust.cli.main import main
folder = pathlib.Path({str(tmp_path)!r})

def requeue(number, frame):
    (folder / "requeued").write_text(str((folder / "checkpoints/last.ckpt").exists()))
    sys.exit(77)

signal.signal(signal.SIGTERM, lambda number, frame: (folder / "bypassed").touch())
signal.signal(signal.SIGUSR2, requeue)
raise SystemExit(main())
"""
    process = start(tmp_path, *RARELY, *LINGER, program=program)
    wait_for(tmp_path / "here0")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR2)
    (tmp_path / "go").touch()
    process.communicate(timeout=100)
    assert process.returncode == 77
    assert (tmp_path / "requeued").read_text() == "True"
    assert not (tmp_path / "bypassed").exists()


def test_training_goes_on_where_the_handler_lets_it(tmp_path):
    program = """
import signal
from deepclust.cli.main import main
signal.signal(signal.SIGTERM, lambda number, frame: print("bypassed", flush=True))
raise SystemExit(main())
"""
    process = start(tmp_path, *RARELY, *LINGER, "trainer.max_epochs=2", program=program)
    said = stop(process, signal.SIGTERM, tmp_path)
    assert process.returncode == 0
    assert said.index("at step 10") < said.index("bypassed")
    assert (tmp_path / "results.json").exists()


def test_a_signal_that_reaches_one_process_stops_all_at_the_same_step(tmp_path):
    """As under srun and torchrun, where every process is a command of its own."""
    group = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731", "WORLD_SIZE": "2"}
    group |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    two = ["hardware=ddp", "hardware.accelerator=cpu", *RARELY, *LINGER]
    processes = [
        start(tmp_path, *two, environment=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)
    ]
    wait_for(tmp_path / "here0", tmp_path / "here1")
    processes[1].send_signal(signal.SIGUSR2)
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGUSR2] * 2
    assert saved_step(tmp_path) == 10
    assert "SIGUSR2: saved" in said[0] and not said[1]


def test_processes_that_are_started_here_are_stopped_too(tmp_path):
    process = start(tmp_path, "hardware=ddp", "hardware.accelerator=cpu", *RARELY, *LINGER)
    stop(process, signal.SIGTERM, tmp_path)
    assert process.returncode == 128 + signal.SIGTERM
    assert saved_step(tmp_path) >= 10  # the signal takes its time to be handed on
    assert not (tmp_path / "results.json").exists()


def test_no_batch_no_checkpoint(tmp_path):
    """In a long E-step the signal takes effect after a while."""
    process = start(tmp_path, *RARELY, *SLOW_START, "callbacks.checkpoint.stop_patience=1")
    began = time.monotonic()
    stop(process, signal.SIGUSR2, tmp_path)
    assert process.returncode == 128 + signal.SIGUSR2
    assert time.monotonic() - began < 90
    assert not (tmp_path / "checkpoints/last.ckpt").exists()
