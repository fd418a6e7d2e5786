"""A run that a signal asks to stop writes a checkpoint and can be resumed; real processes get real signals."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback

from deepclust.engine.run_status import read_status
from tests.processes import find_free_port
from tests.runs.test_resume import (  # noqa: F401 (a fixture)
    assert_same_outcome,
    start_training,
    train_to_end,
    uninterrupted,
)

NO_PERIODIC_CHECKPOINT = ["callbacks.checkpoint.min_seconds=1000", "callbacks.checkpoint.every_n_steps=0"]
PAUSE = ["+callbacks.pause._target_=tests.engine.test_signals.Pause", "+callbacks.pause.needs.folder=folder"]
ENDLESS_E_STEP = [
    "+callbacks.endless._target_=tests.engine.test_signals.EndlessEStep",
    "+callbacks.endless.needs.folder=folder",
]


class Pause(Callback):
    """Pauses after step 10 until the file `go` exists."""

    def __init__(self, *, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 10:
            (self.folder / f"paused{trainer.global_rank}").write_text(str(os.getpid()))
            wait_for(self.folder / "go")


class EndlessEStep(Pause):
    """Stands for an E-step that never ends."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.global_step > 0:
            (self.folder / f"paused{trainer.global_rank}").touch()
            wait_for(self.folder / "never")


def wait_for(*files: Path, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.02)


def send_signal_and_wait(process: subprocess.Popen, number: int, folder: Path) -> str:
    """Send a signal to a process once it has paused, let it go on, and return what it has printed until its end."""
    wait_for(folder / "paused0")
    process.send_signal(number)
    (folder / "go").touch()
    return process.communicate(timeout=100)[0]


def read_saved_step(folder: Path) -> int:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_signal_writes_a_checkpoint_from_which_the_run_resumes(uninterrupted, tmp_path, name):  # noqa: F811
    process = start_training(tmp_path, *NO_PERIODIC_CHECKPOINT, *PAUSE)
    output = send_signal_and_wait(process, signal.Signals[name], tmp_path)
    assert process.returncode == 128 + signal.Signals[name]
    assert f"{name}: saved {tmp_path}/checkpoints/last.ckpt at step 10" in output
    command = output.partition("; to go on: ")[2].partition("\n")[0]
    assert command.startswith("deepclust train ") and command.endswith(f" hydra.run.dir={tmp_path}")
    assert read_saved_step(tmp_path) == 10
    assert read_status(tmp_path)["state"] == "preempted"
    train_to_end(tmp_path, *NO_PERIODIC_CHECKPOINT)
    assert_same_outcome(uninterrupted, tmp_path)
    status = read_status(tmp_path)
    assert (status["state"], status["epoch"], status["epochs"]) == ("done", 6, 6)
    assert status["images_per_second"] > 0 and 0 <= status["score"] <= 1


def test_the_original_handler_is_called_after_the_checkpoint(tmp_path):
    """Handlers as submitit has them: SIGTERM does nothing, SIGUSR2 ends the process. SIGUSR2 is handled first."""
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
    process = start_training(tmp_path, *NO_PERIODIC_CHECKPOINT, *PAUSE, program=program)
    wait_for(tmp_path / "paused0")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR2)
    (tmp_path / "go").touch()
    process.communicate(timeout=100)
    assert process.returncode == 77
    assert (tmp_path / "requeued").read_text() == "True"
    assert not (tmp_path / "bypassed").exists()


@pytest.mark.slow
def test_training_goes_on_if_the_original_handler_returns(tmp_path):
    program = """
import signal
from deepclust.cli.main import main
signal.signal(signal.SIGTERM, lambda number, frame: print("bypassed", flush=True))
raise SystemExit(main())
"""
    process = start_training(tmp_path, *NO_PERIODIC_CHECKPOINT, *PAUSE, "trainer.max_epochs=2", program=program)
    output = send_signal_and_wait(process, signal.SIGTERM, tmp_path)
    assert process.returncode == 0
    assert output.index("at step 10") < output.index("bypassed")
    assert (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_a_signal_that_reaches_one_process_stops_all_at_the_same_step(tmp_path):
    """Under srun and torchrun every process is a command of its own."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port()), "TORCHELASTIC_RUN_ID": "x"}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "PYTHONFAULTHANDLER": "1"}
    overrides = ["hardware=ddp", "hardware.accelerator=cpu", *NO_PERIODIC_CHECKPOINT, *PAUSE]
    processes = [
        start_training(tmp_path, *overrides, environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
    wait_for(tmp_path / "paused0", tmp_path / "paused1")
    processes[1].send_signal(signal.SIGUSR2)
    (tmp_path / "go").touch()
    outputs, errors = zip(*[process.communicate(timeout=100) for process in processes], strict=True)
    assert [process.returncode for process in processes] == [128 + signal.SIGUSR2] * 2, errors
    assert read_saved_step(tmp_path) == 10
    assert "SIGUSR2: saved" in outputs[0] and not outputs[1]


@pytest.mark.slow
def test_a_signal_is_passed_on_to_the_processes_that_the_command_started(tmp_path):
    process = start_training(tmp_path, "hardware=ddp", "hardware.accelerator=cpu", *NO_PERIODIC_CHECKPOINT, *PAUSE)
    send_signal_and_wait(process, signal.SIGTERM, tmp_path)
    assert process.returncode == 128 + signal.SIGTERM
    assert read_saved_step(tmp_path) >= 10  # it takes a while until the signal reaches them
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_signal_to_one_of_the_processes_that_the_command_started_ends_it_as_if_it_had_got_it(tmp_path, name):
    process = start_training(tmp_path, "hardware=ddp", "hardware.accelerator=cpu", *NO_PERIODIC_CHECKPOINT, *PAUSE)
    wait_for(tmp_path / "paused0", tmp_path / "paused1")
    time.sleep(0.2)  # until the number of the process is written
    os.kill(int((tmp_path / "paused1").read_text()), signal.Signals[name])
    (tmp_path / "go").touch()
    _, error = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.Signals[name]
    assert "Traceback" not in error
    if name == "SIGTERM":
        assert read_saved_step(tmp_path) == 10
        assert error.startswith("SIGTERM: saved ") and error.count("\n") == 1, error


@pytest.mark.slow
def test_in_a_long_e_step_the_signal_takes_effect_without_a_checkpoint(tmp_path):
    process = start_training(tmp_path, *NO_PERIODIC_CHECKPOINT, *ENDLESS_E_STEP, "callbacks.checkpoint.stop_patience=1")
    started = time.monotonic()
    send_signal_and_wait(process, signal.SIGUSR2, tmp_path)
    assert process.returncode == 128 + signal.SIGUSR2
    assert time.monotonic() - started < 90
    assert not (tmp_path / "checkpoints/last.ckpt").exists()
