"""A sweep of 12 jobs in which jobs are killed, preempted and fail ends like an undisturbed one after one more start."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deepclust.runs.sweep_jobs import read_sweep
from tests.engine.test_signals import PAUSE
from tests.processes import PROGRAM
from tests.runs.test_resume import assert_same_outcome

SWEEP = [
    *("train", "-m", "method=cc,byol,propos,coke", "seed=0,1,2", "hardware=cpu", "trainer.max_epochs=3"),
    *("callbacks.checkpoint.min_seconds=0", "report.map_points=0", "evaluation.kmeans_restarts=1"),
    *("pixel_baseline_max_values=0", "objective=null"),
]
SIGNALS = {0: "SIGKILL", 4: "SIGKILL", 11: "SIGKILL", 2: "SIGTERM", 7: "SIGUSR2"}  # by the number of the job
FAILED = 9


def disturb(sweep_folder: Path, ended: threading.Event) -> None:
    """Send SIGNALS to the jobs while they pause in the middle of an epoch, and let all go on."""
    open_jobs = set(range(12))
    while open_jobs and not ended.is_set():
        for number in list(open_jobs):
            paused = sweep_folder / str(number) / "paused0"
            if paused.exists() and (pid := paused.read_text()):
                if number in SIGNALS:
                    os.kill(int(pid), signal.Signals[SIGNALS[number]])
                (sweep_folder / str(number) / "go").touch()
                open_jobs.remove(number)
        time.sleep(0.02)


def start_and_wait(*arguments: str, code: int) -> subprocess.CompletedProcess:
    """Run a command to its end, which must have this exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert completed.returncode == code, completed.stderr
    return completed


@pytest.mark.slow
def test_a_disturbed_sweep_ends_like_an_undisturbed_one(tmp_path):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    start_and_wait(*SWEEP, f"hydra.sweep.dir={undisturbed}", code=0)

    bad_state = disturbed / str(FAILED) / "results.json"  # in the way of the file of that name
    bad_state.mkdir(parents=True)
    command = [*SWEEP, *PAUSE, "hydra/launcher=devices", f"hydra.sweep.dir={disturbed}"]
    ended = threading.Event()
    disturber = threading.Thread(target=disturb, args=(disturbed, ended))
    disturber.start()
    try:
        process = start_and_wait(*command, code=2)
    finally:
        ended.set()
        disturber.join()
    assert "6 of 12 jobs failed" in process.stderr and "results.json is a folder" in process.stderr
    states = {int(job.name): job.state for job in read_sweep(disturbed).jobs}
    expected = {"SIGKILL": "stopped", "SIGTERM": "preempted", "SIGUSR2": "preempted"}
    assert states == {
        number: "failed" if number == FAILED else expected.get(SIGNALS.get(number, ""), "done") for number in range(12)
    }

    bad_state.rmdir()
    (disturbed / str(FAILED) / "go").touch()
    kept = {job.name: (job.folder / "results.json").stat().st_mtime_ns for job in done_jobs(disturbed)}
    retried = start_and_wait("sweep", str(disturbed), "retry=failed", code=0)
    assert "6 jobs, " in retried.stdout
    assert len(done_jobs(disturbed)) == 12
    assert all((disturbed / name / "results.json").stat().st_mtime_ns == time for name, time in kept.items())
    for number in range(12):
        assert_same_outcome(undisturbed / str(number), disturbed / str(number))


def done_jobs(folder: Path) -> list:
    """Return the jobs of a sweep that are done."""
    return [job for job in read_sweep(folder).jobs if job.state == "done"]
