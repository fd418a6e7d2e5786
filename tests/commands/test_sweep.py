"""`deepclust sweep`: the table, live and once, JSON for scripts, and another start of what failed or is missing."""

import json
import os
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from deepclust.cli.arguments import quote_path
from deepclust.cli.environment import JOBS_TO_START
from deepclust.cli.main import main
from deepclust.commands import sweep as command
from deepclust.errors import InputError
from tests.runs.test_sweep_jobs import sweep, write_job, write_sweep  # noqa: F401 (a fixture)


def run_sweep(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["deepclust", "sweep", *map(str, arguments)])
    return main()


@pytest.fixture
def started(monkeypatch):
    """The commands that take the place of this process, as (arguments, numbers of jobs, working folder)."""
    commands = []

    def note(program, arguments):
        commands.append((arguments[3:], os.environ.get(JOBS_TO_START), os.getcwd()))

    monkeypatch.setattr(command.os, "execv", note)
    monkeypatch.setattr(command.os, "chdir", os.chdir)
    monkeypatch.setenv(JOBS_TO_START, "")  # put back at the end
    monkeypatch.chdir(os.getcwd())
    return commands


@pytest.mark.parametrize("arguments", [["{}", "--json"], ["json=true", "sweep={}"]])
def test_json(sweep, monkeypatch, capsys, arguments):  # noqa: F811
    assert run_sweep(monkeypatch, *(argument.format(sweep) for argument in arguments)) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["states"] == {"running": 1, "done": 1, "failed": 2, "preempted": 1, "stopped": 2, "waiting": 1}
    assert content["differing_keys"] == ["method", "seed"] and len(content["jobs"]) == 8
    job = content["jobs"][1]
    assert job["state"] == "running" and job["folder"] == str(sweep / "1") and job["overrides"]["method"] == "cc"


def test_table(sweep, monkeypatch, capsys):  # noqa: F811
    assert run_sweep(monkeypatch, sweep) == 0
    out = capsys.readouterr().out
    assert "8 jobs: 1 running, 1 done, 2 failed, 1 preempted, 2 stopped, 1 waiting" in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "job method seed state epoch score images/s left"
    assert lines[1] == "0 cc 0 done 8/8 0.250 50 silhouette"
    assert lines[2].startswith("1 cc 1 running 2/8 0.900 50 90 s cluster_size_entropy, seen ")
    assert lines[3] == "2 cc 2 failed 2/8 0.900 50 KeyError: 1"


def test_a_live_table_ends_with_the_sweep(sweep, monkeypatch, capsys):  # noqa: F811
    shown = []
    states = iter([["running", "done"], ["waiting", "done"], ["done", "failed"]])

    def read(folder):
        found = command.Sweep(folder, [command.SweepJob(str(i), folder, {}, s) for i, s in enumerate(next(states))])
        shown.append(found)
        return found

    monkeypatch.setattr(command, "SECONDS_BETWEEN_TABLES", 0)
    monkeypatch.setattr(command, "read_sweep", read)
    command.watch(sweep)
    assert len(shown) == 3
    assert "2 jobs: 1 done, 1 failed" in capsys.readouterr().out


def test_too_many_jobs_for_the_terminal_leave_out_those_that_are_done(sweep):  # noqa: F811
    table = command.make_table(command.read_sweep(sweep), max_rows=7)
    assert [*table.renderables[0].columns[0].cells] == ["1", "2", "3", "4", "5", "6", "7"]
    table = command.make_table(command.read_sweep(sweep), max_rows=3)
    assert [*table.renderables[0].columns[0].cells] == ["1", "2", "3"]


def test_retry_starts_the_command_of_the_sweep_for_what_is_missing(sweep, started, tmp_path, monkeypatch, capsys):  # noqa: F811
    runtime = {"cwd": str(tmp_path), "config_sources": [{"provider": "command-line", "path": "/own"}]}
    task = ["method=cc,byol", "seed=range(4)", "batch_size=64"]
    write_sweep(sweep, task, job={"name": "train", "config_name": "train"}, runtime=runtime)
    assert run_sweep(monkeypatch, sweep, "retry=failed") == 0
    ((arguments, numbers, folder),) = started
    assert arguments == ["train", "-m", "--config-dir", "/own", *task, f"hydra.sweep.dir={sweep}"]
    assert numbers == "2,3,4,5,6,7" and folder == str(tmp_path)
    assert "starting 6 jobs" in capsys.readouterr().err
    write_sweep(sweep, task, "OptunaSweeper", job={"name": "train", "config_name": "train"}, runtime=runtime)
    assert run_sweep(monkeypatch, sweep, "retry=failed") == 0
    assert "going on with the search" in capsys.readouterr().err and len(started) == 2


@pytest.mark.parametrize("name", ["a,b", "a=b,c=d", "it's", "2024"])
def test_any_folder_is_shown_and_retried(tmp_path, started, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    hydra = {"job": {"name": "train", "config_name": "train"}, "runtime": {"cwd": str(tmp_path)}}
    hydra["overrides"] = {"task": ["seed=0,1"], "hydra": ["++hydra.sweep.dir=old"]}
    write_sweep(tmp_path / name, [], **hydra)
    assert run_sweep(monkeypatch, name, "--json") == 0
    assert json.loads(capsys.readouterr().out)["sweep"] == name
    assert run_sweep(monkeypatch, name, "retry=failed") == 0
    (((*_, task, argument), numbers, _),) = started
    (override,) = OverridesParser.create().parse_overrides([quote_path(argument, is_sweep=True)])
    assert override.key_or_group == "hydra.sweep.dir" and override.value() == str(tmp_path / name)
    assert task == "seed=0,1" and numbers == "0,1"


def test_retry_leaves_runs_of_an_earlier_sweep_alone(tmp_path, started, monkeypatch):
    hydra = {"job": {"name": "train", "config_name": "train"}, "runtime": {"cwd": str(tmp_path)}}
    folder = write_sweep(tmp_path / "sweep", ["seed=0,1"], sweep={"subdir": "${job_folder:0}"}, **hydra)
    write_job(folder / "0", ["seed=1"], error="an earlier sweep")
    write_job(folder / "1", ["seed=1"], results='{"format": 1}')
    write_job(folder / "2", ["seed=0"], error="an earlier sweep")
    assert run_sweep(monkeypatch, folder, "retry=failed") == 0
    assert [numbers for _, numbers, _ in started] == ["0"]


@pytest.mark.parametrize(
    ("hydra", "message"),
    [
        ({}, "does not say how the sweep was started"),
        ({"overrides": {"task": ["seed=0,1"], "hydra": ["hydra.job.env_set.KEY=..."]}}, "sets environment variables"),
        ({"runtime": {"cwd": "/proc/nowhere"}}, "which is not on this machine"),
    ],
)
def test_retry_says_why_it_cannot_start(tmp_path, monkeypatch, capsys, hydra, message, started):
    job = {} if not hydra else {"job": {"name": "train", "config_name": "train"}}
    write_sweep(tmp_path, ["seed=0,1"], **{"runtime": {"cwd": str(tmp_path)}, **job, **hydra})
    assert run_sweep(monkeypatch, tmp_path, "retry=failed") == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and f"hydra.sweep.dir={tmp_path}" in err
    assert not started


@pytest.mark.parametrize("arguments", [["nowhere"], ["retry=all", "sweep=."]])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert run_sweep(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_it_needs_no_torch(sweep):  # noqa: F811
    code = (
        "import sys; from deepclust.cli.main import main\n"
        f"sys.argv = ['deepclust', 'sweep', {str(sweep)!r}]\n"
        "assert main() == 0 and not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("name", ["views=[abc]", "a[/b]"])
def test_names_of_jobs_are_shown_as_they_are(tmp_path, monkeypatch, capsys, name):
    write_job(tmp_path / name, [], {"state": "done"})
    assert run_sweep(monkeypatch, tmp_path) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        {"job": "train"},
        {"job": {"config_name": "train"}},
        {"overrides": ["seed=0"]},
        {"overrides": {"task": 3}},
    ],
)
def test_a_sweep_that_does_not_say_how_it_was_started_is_refused(tmp_path, settings):
    job = {"name": "train", "config_name": "train"}
    overrides = {"task": ["seed=0,1"], "hydra": []}
    whole = {"job": job, "runtime": {"cwd": str(tmp_path), "config_sources": ["x", {"provider": "main"}]}}
    whole |= {"overrides": overrides}
    assert command.compose_command(command.Sweep(tmp_path, [], whole))[0][:3] == ["train", "-m", "seed=0,1"]
    with pytest.raises(InputError, match="does not say how"):
        command.compose_command(command.Sweep(tmp_path, [], whole | settings))
