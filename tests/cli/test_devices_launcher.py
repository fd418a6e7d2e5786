"""The launcher `devices`: its jobs are processes of their own; here they are short programs in place of trainings."""

import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from deepclust.cli import devices_launcher
from deepclust.cli.environment import JOBS_TO_START
from deepclust.cli.main import main
from deepclust.errors import InputError

# In place of a training: it notes its environment in its folder, and does what `seed` says.
JOB = """
import json, os, pathlib, signal, sys, time
values = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
folder = pathlib.Path(values["hydra.run.dir"])
folder.mkdir(parents=True, exist_ok=True)
def stop(number, frame):
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints/last.ckpt").touch()
    (folder / "saved").write_text(str(number))
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HYDRA_FULL_ERROR")
(folder / "job.json").write_text(json.dumps([sys.argv[1:], [os.environ.get(name) for name in names]]))
if values["seed"] == "2":
    print("deepclust: error: it is wrong; expected right; mend it", file=sys.stderr)
    sys.exit(2)
if values["seed"] == "3":
    raise ValueError("a fault")
if values["seed"] == "4":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60 if values["seed"] == "5" else 0)
(folder / "results.json").write_text(json.dumps({{"format": 1, "objective": {{"minimised": 0.5}}}}))
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A function that runs a sweep with overrides in the folder `sweep`, and returns the exit code."""
    monkeypatch.setattr(devices_launcher, "JOB_PROGRAM", JOB)
    monkeypatch.setattr("deepclust.cli.jobs.show_table", lambda outcomes: print("the table"))
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> int:
        arguments = ["train", "-m", "hydra/launcher=devices", "hydra.sweep.dir=sweep", *overrides]
        monkeypatch.setattr(sys, "argv", ["deepclust", *arguments])
        return main()

    return run


def read_jobs(tmp_path) -> dict:
    """Return the arguments and the environment of each job that was started, by the name of its folder."""
    return {path.parent.name: path.read_text() for path in tmp_path.glob("sweep/*/job.json")}


def test_jobs_share_the_gpus_in_groups(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-a,5,6,7")
    assert sweep("seed=0,1", "hydra.launcher.devices_per_job=2", "hardware=gpu") == 0
    jobs = read_jobs(tmp_path)
    assert '"3,GPU-a"' in jobs["0"] and '"5,6"' in jobs["1"], "the fifth would be alone"
    assert '"hardware=gpu", "hydra.run.dir=sweep/1", "hydra.job.num=1"' in jobs["1"] and "launcher" not in jobs["1"]
    out = capsys.readouterr().out
    assert "2 jobs, 2 at once; to watch them: deepclust sweep sweep" in out and "started on GPU 5,6" in out
    assert "the table" in out


def test_on_the_cpu_jobs_have_threads(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices_launcher, "count_cores", lambda: 5)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert sweep("seed=0,1,10", "hardware=cpu", "hydra.launcher.threads_per_job=2") == 0
    assert "3 jobs, 2 at once" in capsys.readouterr().out
    jobs = read_jobs(tmp_path)
    assert len(jobs) == 3 and all('"2", null]' in job for job in jobs.values())


def test_jobs_that_fail_leave_the_others_alone_and_are_told_at_the_end(sweep, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(JOBS_TO_START, "0,1,2,3")
    assert sweep("seed=2,3,4,0,5", "hardware=cpu") == 1
    assert len(read_jobs(tmp_path)) == 4, "the last was not asked for"
    out, err = capfd.readouterr()
    assert "job 3 (seed=0 hardware=cpu) done in" in out
    assert "deepclust: error: job 0 (seed=2 hardware=cpu): it is wrong; expected right; mend it\n" in err
    assert "Traceback" in err and "deepclust: error: job 1 (seed=3 hardware=cpu): ValueError: a fault\n" in err
    assert "job 2 (seed=4 hardware=cpu): killed by SIGKILL; expected all processes to run to the end; see " in err
    assert "see sweep/.jobs/2.log; to go on: deepclust train -m hydra/launcher=devices seed=2,3,4,0,5" in err
    assert "deepclust: error: 3 of 4 jobs failed" in err.splitlines()[-1]
    assert "a fault" in (tmp_path / "sweep/.jobs/1.log").read_text()


@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), pytest.param("SIGUSR2", 140, marks=pytest.mark.slow)]
)
def test_a_signal_reaches_all_jobs_and_all_save(sweep, tmp_path, monkeypatch, capsys, name, code):
    monkeypatch.setattr(devices_launcher, "count_cores", lambda: 2)

    def interrupt():
        while len(read_jobs(tmp_path)) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.Signals[name])

    threading.Thread(target=interrupt, daemon=True).start()
    overrides = ["method=cc,byol,propos", "seed=5", "hardware=cpu"]
    if name == "SIGINT":
        assert sweep(*overrides) == code
    else:
        with pytest.raises(SystemExit) as end:
            sweep(*overrides)
        assert end.value.code == code
    assert [(tmp_path / f"sweep/{number}/saved").read_text() for number in "01"] == ["15", "15"]
    assert not (tmp_path / "sweep/2").exists(), "nothing is started any more"
    err = capsys.readouterr().err
    assert f"{name}: asking 2 jobs to save and stop" in err
    assert "deepclust: not begun: 1 job; saved: 2 jobs (0, 1)\n" in err
    assert "to go on: deepclust train -m hydra/launcher=devices" in err and "hydra.sweep.dir=sweep" in err


def test_after_a_signal_it_is_told_which_jobs_have_failed(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices_launcher, "count_cores", lambda: 2)

    def interrupt():
        log = tmp_path / "sweep/.jobs/0.log"
        while not (log.exists() and "it is wrong" in log.read_text() and "1" in read_jobs(tmp_path)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert sweep("seed=2,5", "hardware=cpu") == 130
    *_, error, ends, interrupted = capsys.readouterr().err.splitlines()
    assert error == "deepclust: error: job 0 (seed=2 hardware=cpu): it is wrong; expected right; mend it"
    assert ends == "deepclust: failed: 1 job (0); saved: 1 job (1)" and "interrupted; to go on: " in interrupted


def test_the_end_of_a_job_is_that_of_the_sweep_though_nobody_reads_what_is_printed(sweep, tmp_path, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    standard_output = os.dup(1)
    os.dup2(writer, 1)
    try:
        assert sweep("seed=4", "hardware=cpu") == 137
    finally:
        os.dup2(standard_output, 1)
        os.close(writer)
        os.close(standard_output)
    assert [*read_jobs(tmp_path)] == ["0"]


def test_a_job_that_a_signal_without_a_name_ended_is_told(tmp_path):
    job = devices_launcher.Job(0, [], OmegaConf.create(), tmp_path)
    error, trace = devices_launcher.describe_failure(job, -40, tmp_path)
    assert error.what == "killed by signal 40" and error.exit_code == 168 and not trace


def test_where_no_process_can_be_started_those_that_run_save(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices_launcher, "count_cores", lambda: 2)
    start, jobs = devices_launcher.DevicesLauncher.start, []

    def start_one(self, job, sweep_folder):
        assert gc.isenabled()
        if jobs:
            raise BlockingIOError("no more processes")
        start(self, job, sweep_folder)
        jobs.append(job)
        while not read_jobs(tmp_path):
            time.sleep(0.01)

    monkeypatch.setattr(devices_launcher.DevicesLauncher, "start", start_one)
    assert sweep("seed=5", "method=cc,byol", "hardware=cpu") == 2
    err = capsys.readouterr().err
    assert "cannot be started: no more processes; expected room for one more process; to go on: deepclust train" in err
    assert jobs[0].process.wait(timeout=60) == 143 and (tmp_path / "sweep/0/saved").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices_per_job": 3}, r"devices_per_job is 3, and there are 2 GPUs; expected at most 2; "),
        ({"devices_per_job": 0}, r"hydra.launcher.devices_per_job is 0; expected a whole number above 0; "),
        ({"threads_per_job": "x"}, r"hydra.launcher.threads_per_job is x; expected a whole number above 0; "),
        ({"devices": "x"}, r"hydra.launcher.devices is x; expected auto, or a list of GPUs such as \[0,1\]; "),
    ],
)
def test_settings_that_do_not_fit_are_refused(monkeypatch, settings, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    known = {"devices": "auto", "devices_per_job": 1, "threads_per_job": 1} | settings
    job = devices_launcher.Job(0, [], OmegaConf.create({"hardware": {"accelerator": "auto"}}), Path())
    with pytest.raises(InputError, match=message):
        devices_launcher.DevicesLauncher(**known).list_slots([job])


def test_a_refusal_is_one_line(sweep, tmp_path, capsys):
    assert sweep("seed=0,1", "hydra.launcher.threads_per_job=0") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "set hydra.launcher.threads_per_job=1" in err
    assert not read_jobs(tmp_path)


def test_a_fault_of_the_launcher_is_not_told_as_one_of_the_configuration(sweep, monkeypatch, capsys):
    def fail():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(devices_launcher, "count_cores", fail)
    assert sweep("seed=0,1", "hardware=cpu") == 2
    err = capsys.readouterr().err
    assert "error: DevicesLauncher has failed: BlockingIOError: [Errno 11] Resource temporarily unavailable; " in err
    assert err.count("\n") == 1 and "hydra/launcher=devices" in err


@pytest.mark.parametrize(("visible", "devices"), [("", []), ("-1", []), ("1, 0", ["1", "0"]), ("0,-1,2", ["0"])])
def test_visible_gpus(monkeypatch, visible, devices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices_launcher.list_devices("auto") == devices
    assert devices_launcher.list_devices([4, 2]) == ["4", "2"]


def test_a_job_whose_sweep_has_ended_does_not_start(monkeypatch):
    monkeypatch.setattr("deepclust.cli.main.main", lambda: pytest.fail("it has started"))
    monkeypatch.setattr(devices_launcher.ctypes, "CDLL", lambda name: None)
    assert devices_launcher.run_as_job(os.getppid() + 1) == 143
