"""Runs under Slurm; they need a partition of two nodes with two cores each, accounting, and a shared folder."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import PROGRAM, run_deepclust
from tests.runs.test_resume import assert_same_outcome

has_slurm = shutil.which("sinfo") and subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode == 0
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_slurm, reason="needs Slurm")]

TRAIN_ARGUMENTS = [
    "train",
    "method=cc",
    "trainer.max_epochs=30",
    "report.map_points=60",
    "callbacks.checkpoint.min_seconds=1000",
]
SLURM_HARDWARE = ["hardware=slurm", "hardware.accelerator=cpu"]
SUBMITIT_SWEEP = [
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.timeout_min=10",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.max_num_timeout=5",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def srun(*arguments: str, tasks: tuple[str, ...] = ("--nodes=1", "--ntasks-per-node=2")) -> subprocess.CompletedProcess:
    command = ["srun", *tasks, sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def wait_until(condition, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def has_metrics(folder: Path) -> bool:
    """Return whether training has logged its first metrics."""
    return (folder / "metrics.csv").exists() and (folder / "metrics.csv").stat().st_size > 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_deepclust(*TRAIN_ARGUMENTS, "hardware=ddp", "hardware.accelerator=cpu", f"hydra.run.dir={folder}")
    return folder


@pytest.mark.parametrize("tasks", [("--nodes=1", "--ntasks-per-node=2"), ("--nodes=2", "--ntasks-per-node=1")])
def test_tasks_of_srun_learn_what_processes_of_the_command_learn(uninterrupted, tmp_path, tasks, monkeypatch):
    monkeypatch.chdir(tmp_path)
    completed = srun(*TRAIN_ARGUMENTS, *SLURM_HARDWARE, tasks=tasks)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count("results.json") == 1, "only one task prints the summary"
    (folder,) = (tmp_path / "outputs/slurm").iterdir()
    assert_same_outcome(uninterrupted, folder)


@pytest.mark.parametrize("override", ["batch_size=255", "batchsize=1", "hardware.devices=3"])
def test_an_error_of_all_tasks_is_printed_once(tmp_path, override):
    completed = srun(*TRAIN_ARGUMENTS, *SLURM_HARDWARE, override, f"hydra.run.dir={tmp_path}")
    assert completed.returncode == 2
    assert completed.stderr.count("deepclust: error") == 1


def test_a_requeued_job_resumes(uninterrupted, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(f"""#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=2 --time=10 --requeue --open-mode=append
srun {sys.executable} -c '{PROGRAM}' {" ".join([*TRAIN_ARGUMENTS, *SLURM_HARDWARE])}
if [ $? -eq 140 ]; then scontrol requeue $SLURM_JOB_ID; fi
""")
    job = subprocess.check_output(["sbatch", "--parsable", script], cwd=tmp_path, env=ENVIRONMENT, text=True).strip()
    folder = tmp_path / "outputs/slurm" / f"{job}.0"
    try:
        wait_until(lambda: has_metrics(folder))
        subprocess.run(["scancel", "--signal=USR2", job], check=True)
        wait_until(lambda: (folder / "results.json").exists())
    finally:
        subprocess.run(["scancel", job])
    assert "SIGUSR2: saved" in (folder / "train.log").read_text()
    assert_same_outcome(uninterrupted, folder)


def test_a_preempted_job_of_a_sweep_resumes(uninterrupted, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    arguments = [
        *TRAIN_ARGUMENTS,
        *SLURM_HARDWARE,
        *SUBMITIT_SWEEP,
        "hydra.launcher.tasks_per_node=2",
        f"hydra.sweep.dir={tmp_path}",
        "-m",
    ]
    sweep = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=ENVIRONMENT)
    try:
        wait_until(lambda: has_metrics(tmp_path / "0") or sweep.poll() is not None)
        (job,) = (file.parent.name for file in (tmp_path / ".submitit").glob("*/*_submission.sh"))
        subprocess.run(["scancel", "--signal=USR2", job], check=True)
        assert sweep.wait(timeout=300) == 0
    finally:
        sweep.send_signal(signal.SIGTERM)
    assert_same_outcome(uninterrupted, tmp_path / "0")


def test_a_job_that_fails_does_not_stop_the_others(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    values = ["hardware=cpu", "trainer.max_epochs=1", "dataset.num_clusters=5000,10"]
    completed = run_deepclust(
        *TRAIN_ARGUMENTS, *SUBMITIT_SWEEP, *values, f"hydra.sweep.dir={tmp_path}", "-m", check=False
    )
    assert completed.returncode == 2 and "set dataset.num_clusters" in completed.stderr
    assert (tmp_path / "0/error.txt").exists() and (tmp_path / "1/results.json").exists()
