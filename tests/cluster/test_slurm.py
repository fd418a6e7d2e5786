"""Runs under Slurm; they need a partition of two nodes with two cores each, accounting, and a shared folder.

`make test-slurm` makes such a cluster on one machine. Whatever happens to a run, it ends bit for bit as one that nobody
has disturbed.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning import Callback

from deepclust.callbacks.last_checkpoint import LastCheckpoint
from deepclust.exit_codes import PROCESS_LOST
from tests.processes import PROGRAM, TWO_PROCESSES, run_deepclust
from tests.runs.test_resume import assert_same_outcome


def slurm_answers() -> bool:
    """Return whether there is a Slurm whose controller answers."""
    if shutil.which("sinfo") is None:
        return False
    try:
        return subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not slurm_answers(), reason="needs Slurm")]

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
TIMEOUT = 1200  # seconds for one training; the two nodes share the cores of one machine
REPOSITORY = str(Path(__file__).parents[2])  # the jobs use HoldForSignal, wherever they start
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [REPOSITORY, os.environ.get("PYTHONPATH")])),
}
HOLD = ["+callbacks.hold._target_=tests.cluster.test_slurm.HoldForSignal", "+callbacks.hold.needs.folder=folder"]


class HoldForSignal(Callback):
    """Waits for a signal: at step 10 of a job's first start, at step 20 of the second, and so on for `starts` starts.

    A file `held.START.RANK` with the number of the process says that it waits.
    """

    def __init__(self, *, folder, starts):
        self.folder, self.starts, self.has_held = folder, starts, False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if start < self.starts and trainer.global_step >= 10 * (start + 1) and not self.has_held:
            self.has_held = True
            temporary = self.folder / f"unfinished.{trainer.global_rank}"
            temporary.write_text(str(os.getpid()))
            temporary.rename(self.folder / f"held.{start}.{trainer.global_rank}")
            (last_checkpoint,) = (c for c in trainer.callbacks if isinstance(c, LastCheckpoint))
            wait_until(lambda: last_checkpoint.stop_signals.received)


def srun(*arguments: str, tasks: tuple[str, ...] = ("--nodes=1", "--ntasks-per-node=2")) -> subprocess.CompletedProcess:
    command = ["srun", *tasks, sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)


def wait_until(condition, seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def submit(script: Path, text: str, *options: str) -> str:
    """Submit a batch script from its folder and return the number of the job."""
    script.write_text(text)
    command = ["sbatch", "--parsable", *options, str(script)]
    return subprocess.check_output(command, cwd=script.parent, env=ENVIRONMENT, text=True).strip()


def is_over(job: str) -> bool:
    """Return whether Slurm has nothing left to do for a job."""
    return not subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, timeout=60).stdout.strip()


def start_sweep(folder: Path, *arguments: str) -> subprocess.Popen:
    """Start a sweep by submitit in a folder."""
    command = [sys.executable, "-c", PROGRAM, "train", *SUBMITIT_SWEEP, *arguments, f"hydra.sweep.dir={folder}", "-m"]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def submitted_jobs(folder: Path) -> list[str]:
    """Return the numbers of the jobs of a sweep by submitit, in order; none where they are not submitted yet."""
    files = (folder / ".submitit").glob("*/*_submission.sh")
    array = next((file.parent.name.partition("_")[0] for file in files), None)
    if array is None:
        return []
    listed = subprocess.check_output(["squeue", "-h", "-r", "-o", "%i", "-j", array], text=True).split()
    return sorted(listed, key=lambda job: int(job.partition("_")[2] or 0))


def end_sweep(sweep: subprocess.Popen, folder: Path) -> None:
    """End a sweep and what Slurm still holds of it, which would keep the nodes from the next test."""
    sweep.terminate()
    for file in (folder / ".submitit").glob("*/*_submission.sh"):
        subprocess.run(["scancel", file.parent.name])


def signal_job(job: str, name: str) -> None:
    """Send a signal to all processes of a job.

    `scancel` does so at once. It is not waited for: it returns late where the job is requeued meanwhile.
    """
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(["scancel", f"--signal={name}", job], check=True, timeout=10)


def has_metrics(folder: Path) -> bool:
    """Return whether training has logged its first metrics."""
    return (folder / "metrics.csv").exists() and (folder / "metrics.csv").stat().st_size > 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_deepclust(
        *TRAIN_ARGUMENTS, "hardware=ddp", "hardware.accelerator=cpu", f"hydra.run.dir={folder}", timeout=TIMEOUT
    )
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
        assert sweep.wait(timeout=TIMEOUT) == 0
    finally:
        sweep.send_signal(signal.SIGTERM)
    assert_same_outcome(uninterrupted, tmp_path / "0")


def test_a_job_that_fails_does_not_stop_the_others(tmp_path):
    values = ["hardware=cpu", "trainer.max_epochs=1", "dataset.num_clusters=5000,10"]
    completed = run_deepclust(
        *TRAIN_ARGUMENTS, *SUBMITIT_SWEEP, *values, f"hydra.sweep.dir={tmp_path}", "-m", check=False, timeout=TIMEOUT
    )
    assert completed.returncode == 2 and "set dataset.num_clusters" in completed.stderr
    assert (tmp_path / "0/error.txt").exists() and (tmp_path / "1/results.json").exists()


def test_a_job_that_comes_near_its_time_limit_resumes(uninterrupted, tmp_path):
    limits = ["hydra.launcher.timeout_min=3", "hydra.launcher.signal_delay_s=60", "hydra.launcher.tasks_per_node=2"]
    sweep = start_sweep(tmp_path, *TRAIN_ARGUMENTS[1:], *SLURM_HARDWARE, *limits, *HOLD, "+callbacks.hold.starts=1")
    try:
        assert sweep.wait(timeout=TIMEOUT) == 0, sweep.stderr.read()
    finally:
        end_sweep(sweep, tmp_path)
    assert (tmp_path / "0/held.0.1").exists()
    assert "SIGUSR2: saved" in (tmp_path / "0/train.log").read_text()
    assert_same_outcome(uninterrupted, tmp_path / "0")


def test_a_job_that_is_cancelled_without_warning_goes_on_when_submitted_again(uninterrupted, tmp_path):
    training = [*TRAIN_ARGUMENTS, *SLURM_HARDWARE, f"hydra.run.dir={tmp_path}"]
    text = f"""#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=2 --time=30
srun {sys.executable} -c '{PROGRAM}' {" ".join(training)} callbacks.checkpoint.min_seconds=0
"""
    jobs = [submit(tmp_path / "job.sh", text)]
    try:
        wait_until(lambda: (tmp_path / "checkpoints/last.ckpt").exists())
        signal_job(jobs[0], "KILL")
        wait_until(lambda: is_over(jobs[0]))
        assert not (tmp_path / "results.json").exists()
        jobs.append(submit(tmp_path / "job.sh", text))
        wait_until(lambda: is_over(jobs[1]))
    finally:
        subprocess.run(["scancel", *jobs])
    assert "goes on at epoch" in (tmp_path / "train.log").read_text()
    assert_same_outcome(uninterrupted, tmp_path)


def test_a_job_whose_node_goes_down_resumes_on_another(uninterrupted, tmp_path):
    text = f"""#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=2 --time=30 --requeue --open-mode=append
echo $SLURM_JOB_NODELIST >> nodes
srun {sys.executable} -c '{PROGRAM}' {" ".join([*TRAIN_ARGUMENTS, *SLURM_HARDWARE])} callbacks.checkpoint.min_seconds=0
"""
    job = submit(tmp_path / "job.sh", text)
    folder = tmp_path / "outputs/slurm" / f"{job}.0"
    update = ["scontrol", "update", "reason=test"]
    node = None
    try:
        wait_until(lambda: (folder / "checkpoints/last.ckpt").exists())
        node = (tmp_path / "nodes").read_text().strip()
        subprocess.run([*update, f"nodename={node}", "state=down"], check=True)
        wait_until(lambda: (folder / "results.json").exists() or is_over(job))
    finally:
        subprocess.run(["scancel", job])
        if node is not None:
            subprocess.run([*update, f"nodename={node}", "state=resume"], check=True)
    assert len(set((tmp_path / "nodes").read_text().split())) == 2
    assert "goes on at epoch" in (folder / "train.log").read_text()
    assert_same_outcome(uninterrupted, folder)


def test_a_sweep_of_methods_that_is_preempted_twice(tmp_path):
    methods = ["cc", "propos", "secu", "coke"]
    training = ["trainer.max_epochs=5", "report.map_points=0", f"method={','.join(methods)}"]
    expected = f"hydra.sweep.dir={tmp_path / 'expected'}"
    run_deepclust("train", *training, *TWO_PROCESSES, expected, "-m", timeout=2 * TIMEOUT)
    folder = tmp_path / "disturbed"
    sweep = start_sweep(
        folder, *training, *SLURM_HARDWARE, "hydra.launcher.tasks_per_node=2", *HOLD, "+callbacks.hold.starts=2"
    )
    signalled = set()

    def signal_those_that_hold() -> bool:
        jobs = submitted_jobs(folder)
        for job, number in [(job, int(job.partition("_")[2])) for job in jobs if "_" in job]:
            for start in (0, 1):
                held = [folder / str(number) / f"held.{start}.{rank}" for rank in (0, 1)]
                if (number, start) not in signalled and all(file.exists() for file in held):
                    signal_job(job, "USR2")
                    signalled.add((number, start))
        return sweep.poll() is not None

    try:
        wait_until(signal_those_that_hold, 3 * TIMEOUT)
    finally:
        end_sweep(sweep, folder)
    assert sweep.returncode == 0, sweep.stderr.read()
    assert len(signalled) == 2 * len(methods)
    for number, method in enumerate(methods):
        assert_same_outcome(tmp_path / "expected" / str(number), folder / str(number))
        command = json.loads((folder / str(number) / "results.json").read_text())["command"]
        assert (
            command.startswith("deepclust train ") and f" method={method} " in command and "-m" not in command.split()
        )


def test_a_sweep_that_is_started_again_with_one_seed_more(tmp_path):
    training = ["method=cc", "trainer.max_epochs=2", "report.map_points=0", "hardware=cpu"]
    run_deepclust("train", *training, "seed=0,1", f"hydra.sweep.dir={tmp_path / 'expected'}", "-m", timeout=TIMEOUT)
    folder = tmp_path / "grown"
    first = start_sweep(folder, *training, "seed=0")
    assert first.wait(timeout=TIMEOUT) == 0, first.stderr.read()
    written = (folder / "0/results.json").stat().st_mtime_ns
    second = start_sweep(folder, *training, "seed=0,1")
    assert second.wait(timeout=TIMEOUT) == 0, second.stderr.read()
    assert (folder / "0/results.json").stat().st_mtime_ns == written
    for number in ("0", "1"):
        assert_same_outcome(tmp_path / "expected" / number, folder / number)


def test_a_job_array(tmp_path):
    training = ["method=cc", "trainer.max_epochs=2", "report.map_points=0"]
    run_deepclust(
        "train",
        *training,
        "hardware=cpu",
        "seed=0,1",
        f"hydra.sweep.dir={tmp_path / 'expected'}",
        "-m",
        timeout=TIMEOUT,
    )
    text = f"""#!/bin/bash
#SBATCH --ntasks-per-node=1 --time=30 --array=0-1
srun {sys.executable} -c '{PROGRAM}' train {" ".join([*training, *SLURM_HARDWARE])} seed=$SLURM_ARRAY_TASK_ID
"""
    job = submit(tmp_path / "job.sh", text)
    try:
        wait_until(lambda: is_over(job))
    finally:
        subprocess.run(["scancel", job])
    folders = list((tmp_path / "outputs/slurm").iterdir())
    assert len(folders) == 2
    for folder in folders:
        seed = json.loads((folder / "results.json").read_text())["seed"]
        assert_same_outcome(tmp_path / "expected" / str(seed), folder)


def test_a_sweep_whose_job_loses_a_process_says_which(tmp_path):
    sweep = start_sweep(
        tmp_path,
        *TRAIN_ARGUMENTS[1:],
        *SLURM_HARDWARE,
        "hydra.launcher.tasks_per_node=2",
        *HOLD,
        "+callbacks.hold.starts=1",
    )
    try:
        held = tmp_path / "0/held.0.1"
        wait_until(lambda: held.exists() or sweep.poll() is not None)
        os.kill(int(held.read_text()), signal.SIGKILL)
        (job,) = submitted_jobs(tmp_path)
        signal_job(job, "USR1")  # the other process goes on, and finds that it is alone
        _, errors = sweep.communicate(timeout=TIMEOUT)
    finally:
        end_sweep(sweep, tmp_path)
    assert sweep.returncode == PROCESS_LOST
    assert errors.count("deepclust: error") == 1 and "task 1: Killed" in errors and "Traceback" not in errors
    told = (tmp_path / "0/error.txt").read_text()
    assert told.count("\n") == 1 and "the process of rank 1" in told
