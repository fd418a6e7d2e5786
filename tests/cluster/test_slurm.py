"""On a Slurm that answers: needs a partition of two nodes with two cores each, accounting, and a shared folder."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.test_launch import deepclust
from tests.runs.test_resume import same

answers = shutil.which("sinfo") and subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode == 0
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not answers, reason="no Slurm answers")]

RUN = ["train", "method=cc", "trainer.max_epochs=30", "report.map_points=60", "callbacks.checkpoint.min_seconds=1000"]
TWO = ["hardware=slurm", "hardware.accelerator=cpu"]
SWEEP = [
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.timeout_min=10",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.max_num_timeout=5",
]
PROGRAM = "from deepclust.cli.main import main; raise SystemExit(main())"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def srun(*arguments: str, tasks: tuple[str, ...] = ("--nodes=1", "--ntasks-per-node=2")) -> subprocess.CompletedProcess:
    command = ["srun", *tasks, sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def wait(what, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.2)


def trains(folder: Path) -> bool:
    """Whether a first line of figures is there."""
    return (folder / "metrics.csv").exists() and (folder / "metrics.csv").stat().st_size > 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    deepclust(*RUN, "hardware=ddp", "hardware.accelerator=cpu", f"hydra.run.dir={folder}")
    return folder


@pytest.mark.parametrize("tasks", [("--nodes=1", "--ntasks-per-node=2"), ("--nodes=2", "--ntasks-per-node=1")])
def test_srun_learns_what_processes_started_here_learn(undisturbed, tmp_path, tasks, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = srun(*RUN, *TWO, tasks=tasks)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results.json") == 1, "one of them speaks"
    (folder,) = (tmp_path / "outputs/slurm").iterdir()
    same(undisturbed, folder)


@pytest.mark.parametrize("wrong", ["batch_size=255", "batchsize=1", "hardware.devices=3"])
def test_an_error_of_all_tasks_is_one_line(tmp_path, wrong):
    done = srun(*RUN, *TWO, wrong, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.count("deepclust: error") == 1


def test_a_job_that_goes_back_into_the_queue_goes_on(undisturbed, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(f"""#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=2 --time=10 --requeue --open-mode=append
srun {sys.executable} -c '{PROGRAM}' {" ".join([*RUN, *TWO])}
if [ $? -eq 140 ]; then scontrol requeue $SLURM_JOB_ID; fi
""")
    job = subprocess.check_output(["sbatch", "--parsable", script], cwd=tmp_path, env=ENVIRONMENT, text=True).strip()
    folder = tmp_path / "outputs/slurm" / f"{job}.0"
    try:
        wait(lambda: trains(folder))
        subprocess.run(["scancel", "--signal=USR2", job], check=True)
        wait(lambda: (folder / "results.json").exists())
    finally:
        subprocess.run(["scancel", job])
    assert "SIGUSR2: saved" in (folder / "train.log").read_text()
    same(undisturbed, folder)


def test_a_preempted_job_of_a_sweep_goes_on(undisturbed, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    arguments = [*RUN, *TWO, *SWEEP, "hydra.launcher.tasks_per_node=2", f"hydra.sweep.dir={tmp_path}", "-m"]
    sweep = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=ENVIRONMENT)
    try:
        wait(lambda: trains(tmp_path / "0") or sweep.poll() is not None)
        (job,) = (file.parent.name for file in (tmp_path / ".submitit").glob("*/*_submission.sh"))
        subprocess.run(["scancel", "--signal=USR2", job], check=True)
        assert sweep.wait(timeout=300) == 0
    finally:
        sweep.send_signal(signal.SIGTERM)
    same(undisturbed, tmp_path / "0")


def test_a_job_that_fails_leaves_the_others_alone(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    values = ["hardware=cpu", "trainer.max_epochs=1", "dataset.num_clusters=5000,10"]
    done = deepclust(*RUN, *SWEEP, *values, f"hydra.sweep.dir={tmp_path}", "-m", check=False)
    assert done.returncode == 2 and "set dataset.num_clusters" in done.stderr
    assert (tmp_path / "0/error.txt").exists() and (tmp_path / "1/results.json").exists()
