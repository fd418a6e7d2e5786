"""The jobs of a sweep are read from its folder: those planned, their states, and whatever may be damaged."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
import yaml

from deepclust.errors import InputError
from deepclust.runs.sweep_jobs import read_sweep, summarize_traceback

HERE = {"pid": os.getpid(), "host": socket.gethostname()}


def write_sweep(folder: Path, task: list[str], sweeper: str = "BasicSweeper", **hydra) -> Path:
    """Write what Hydra keeps of a sweep."""
    settings = {"sweeper": {"_target_": f"x.{sweeper}", "params": None}, "overrides": {"task": task, "hydra": []}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "multirun.yaml").write_text(yaml.safe_dump({"hydra": settings | hydra}))
    return folder


def write_job(folder: Path, overrides: list[str], status: dict | None = None, *, age: float = 0, **files: str) -> None:
    """Write the folder of a job that has begun; `files` are contents by the stems of their names.

    `age` is that of its heartbeat, in seconds.
    """
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/config.yaml").write_text("{}")
    (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump(overrides))
    if status is not None:
        (folder / "status.json").write_text(json.dumps(status))
        os.utime(folder / "status.json", (time.time() - age,) * 2)
    for name, text in files.items():
        (folder / (f"{name}.txt" if name == "error" else f"{name}.json")).write_text(text)


@pytest.fixture
def sweep(tmp_path):
    """A sweep with a job in each state, in the folder `sweep`."""
    folder = write_sweep(tmp_path / "sweep", ["method=cc,byol", "seed=range(4)", "batch_size=64"])
    numbers = [(method, seed) for method in ("cc", "byol") for seed in range(4)]
    overrides = [[f"method={method}", f"seed={seed}", "batch_size=64"] for method, seed in numbers]
    progress = {"epoch": 2, "epochs": 8, "images_per_second": 50.5, "seconds_left": 90.0, "score": 0.9}
    running = {"state": "running", "score_name": "eval/cluster_size_entropy", **HERE, **progress}
    results = {"format": 1, "epochs": 8, "objective": {"name": "select/silhouette", "value": 0.25}}
    write_job(folder / "0", overrides[0], running | {"state": "done"}, results=json.dumps(results))
    write_job(folder / "1", overrides[1], running)
    write_job(folder / "2", overrides[2], running | {"state": "failed"}, error="Traceback (most\n  File\nKeyError: 1\n")
    write_job(folder / "3", overrides[3], running | {"state": "preempted"})
    write_job(folder / "4", overrides[4], running | {"host": "elsewhere"}, age=1000)
    write_job(folder / "5", overrides[5], running | {"state": "stopped"})
    write_job(folder / "6", overrides[6], None, error="it is wrong; expected right; mend it\n")
    return folder


def test_every_job_has_its_state_those_not_begun_too(sweep):
    found = read_sweep(sweep)
    states = ["done", "running", "failed", "preempted", "stopped", "stopped", "failed", "waiting"]
    assert [job.state for job in found.jobs] == states
    assert [job.name for job in found.jobs] == [str(number) for number in range(8)]
    assert found.differing_keys == ["method", "seed"]
    assert found.count_states() == {"running": 1, "done": 1, "failed": 2, "preempted": 1, "stopped": 2, "waiting": 1}
    done, running, failed, *_, refused, waiting = found.jobs
    assert (done.epoch, done.epochs, done.score_name, done.score) == (8, 8, "select/silhouette", 0.25)
    assert (running.epoch, running.epochs, running.images_per_second, running.seconds_left) == (2, 8, 50.5, 90.0)
    assert running.heartbeat_age is not None and running.heartbeat_age < 60
    assert failed.error == "KeyError: 1" and failed.seconds_left is None
    assert refused.error == "it is wrong; expected right; mend it"
    assert waiting.overrides == {"method": "byol", "seed": "3", "batch_size": "64"}
    assert found.jobs[4].heartbeat_age > 900


def test_reading_changes_nothing(sweep):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sweep.rglob("*")}
    read_sweep(sweep)
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sweep.rglob("*")}


def test_an_earlier_stage_keeps_a_run_alive(tmp_path):
    folder = write_sweep(tmp_path, ["seed=0,1"])
    write_job(folder / "0", ["seed=0"], {"state": "running", **HERE}, age=1000)
    assert read_sweep(folder).jobs[0].state == "stopped"
    (folder / "0/before").mkdir()
    (folder / "0/before/status.json").write_text(json.dumps({"epoch": 3, "epochs": 5}))
    job = read_sweep(folder).jobs[0]
    assert (job.state, job.epoch, job.epochs, job.pid) == ("running", 3, 5, os.getpid())


def test_the_clock_of_another_host_does_not_matter(tmp_path):
    for number, clock in enumerate((-1000, 1000)):
        elsewhere = {"state": "running", "host": "elsewhere", "heartbeat": time.time() + clock}
        write_job(tmp_path / str(number), [f"seed={number}"], elsewhere, age=60 if clock < 0 else 300)
    assert [job.state for job in read_sweep(tmp_path).jobs] == ["running", "stopped"]


def test_jobs_are_found_by_their_values_where_folders_have_other_names(tmp_path):
    folder = write_sweep(tmp_path, ["seed=0,1"])
    write_job(folder / "first", ["seed=1"], {"state": "running", **HERE})
    write_job(folder / "10", ["seed=10"], {"state": "running", **HERE})
    jobs = read_sweep(folder).jobs
    assert [(job.name, job.state) for job in jobs] == [("0", "waiting"), ("first", "running"), ("10", "running")]


def test_runs_of_an_earlier_sweep_in_the_folder_shift_no_number(tmp_path):
    subdir = {"sweep": {"subdir": "${job_folder:${hydra.job.num}}"}}
    folder = write_sweep(tmp_path, ["seed=3,4,1"], **subdir)
    for number, seed in enumerate((0, 1, 3, 2)):  # an earlier sweep had seed=0,1,3,2
        write_job(folder / str(number), [f"seed={seed}"], results='{"format": 1}')
    jobs = read_sweep(folder).jobs
    assert [(job.number, job.name, job.overrides["seed"]) for job in jobs] == [
        *((0, "0", "3"), (1, "1", "4"), (2, "2", "1")),
        (None, "3", "2"),
    ]
    assert [job.state for job in jobs] == ["failed", "failed", "failed", "done"]
    assert jobs[1].error == "its folder holds a run of other values: seed=1" and jobs[1].score is None


def test_numbers_are_those_of_the_jobs_where_folders_are_named_by_values(tmp_path):
    folder = write_sweep(tmp_path, ["seed=3,1,0"], sweep={"subdir": "${seed}"})
    write_job(folder / "1", ["seed=1"], results='{"format": 1}')
    write_job(folder / "0", ["seed=0"], error="it is wrong")
    jobs = read_sweep(folder).jobs
    assert [(job.number, job.overrides["seed"], job.state) for job in jobs] == [
        *((0, "3", "waiting"), (1, "1", "done"), (2, "0", "failed"))
    ]


@pytest.mark.parametrize(
    "text",
    ["", "[", "a: [1", "hydra: 3", "hydra: {sweep: 3, sweeper: {_target_: x.BasicSweeper}}", "\0", "[" * 400],
)
def test_what_is_damaged_leaves_the_folders_that_are_there(tmp_path, text):
    (tmp_path / "multirun.yaml").write_text(text)
    write_job(tmp_path / "0", ["seed=0"], {"state": [], "epoch": 1e999, "pid": "3"}, results="[")
    (job,) = read_sweep(tmp_path).jobs
    assert job.state == "stopped" and job.epoch is None and job.pid is None


def test_a_search_has_the_jobs_that_have_begun(tmp_path):
    folder = write_sweep(tmp_path, ["seed=interval(0,9)"], sweeper="OptunaSweeper")
    write_job(folder / "0", ["seed=4"], {"state": "running", **HERE})
    assert [job.overrides for job in read_sweep(folder).jobs] == [{"seed": "4"}]


def test_no_sweep(tmp_path):
    with pytest.raises(InputError, match=r"holds no run.*check sweep=DIR"):
        read_sweep(tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        read_sweep(tmp_path / "nothing")


@pytest.mark.parametrize("key", ["epoch", "epochs", "score", "images_per_second", "seconds_left", "pid"])
def test_a_number_that_no_float_can_hold_is_unknown(key, tmp_path):
    write_job(tmp_path / "0", [], {"state": "running", "host": "elsewhere", key: 10**400})
    (job,) = read_sweep(tmp_path).jobs
    assert job.state == "running" and getattr(job, key) is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("what; expected this; do that\n", "what; expected this; do that"),
        ("Traceback (most recent call last):\n  File x\n    y\nValueError: a\n", "ValueError: a"),
        ("Traceback (most recent call last):\n  File x\n    y\ntorch.Error: a\n  b\n", "torch.Error: a b"),
        ("Traceback (most recent call last):\n  File x\nKeyboardInterrupt", "KeyboardInterrupt"),
        ("", ""),
    ],
)
def test_an_error_is_one_line(text, line):
    assert summarize_traceback(text) == line
