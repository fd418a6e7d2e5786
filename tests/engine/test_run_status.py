"""status.json: the states of a run, heartbeats, and whether a run is alive; it never ends a run."""

import json
import os
import subprocess
import sys
import time

import pytest

from deepclust.engine import run_status
from deepclust.engine.run_status import (
    heartbeats_written,
    is_alive,
    read_file_system_clock,
    read_last_heartbeat,
    read_status,
    run_state_recorded,
    update_status,
)


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, "done"), (ValueError(), "failed"), (KeyboardInterrupt(), "stopped"), (SystemExit(143), "preempted")],
)
def test_the_state_tells_how_a_run_has_ended(tmp_path, error, state):
    update_status(tmp_path, epoch=7)
    try:
        with run_state_recorded(tmp_path):
            status = read_status(tmp_path)
            assert status["state"] == "running" and status["pid"] == os.getpid() and "epoch" not in status
            assert is_alive(status, heartbeat_age=0)
            update_status(tmp_path, epoch=1, score=float("nan"))
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["epoch"], status["score"]) == (state, 1, None)
    assert not is_alive(status, heartbeat_age=0)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_read_that_fails_once_loses_nothing(tmp_path, monkeypatch):
    def fail(path, **limits):
        raise OSError(116, "Stale file handle")

    with run_state_recorded(tmp_path):
        update_status(tmp_path, epoch=1)
        with monkeypatch.context() as patch:
            patch.setattr(run_status, "read_json", fail)
            update_status(tmp_path, epoch=2)
        status = read_status(tmp_path)
        assert status["state"] == "running" and status["pid"] == os.getpid() and status["epoch"] == 1
        monkeypatch.setattr("deepclust.engine.small_files.read_json", fail)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"


def test_a_reader_tries_again_where_the_file_is_replaced_meanwhile(tmp_path, monkeypatch):
    replies = iter([{}, {"state": "running"}])
    monkeypatch.setattr(run_status, "read_json_object", lambda file, **limits: next(replies))
    assert read_status(tmp_path) == {"state": "running"}


def test_a_heartbeat_has_the_time_of_the_file_system(tmp_path, monkeypatch):
    assert read_last_heartbeat(tmp_path) is None
    update_status(tmp_path)
    monkeypatch.setattr(run_status.time, "time", lambda: 0.0)  # another host's clock
    assert 0 <= read_file_system_clock(tmp_path) - read_last_heartbeat(tmp_path) < 60
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    assert read_file_system_clock(tmp_path / "gone") == 0.0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_status_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, error):
    def fail(path, text):
        raise error

    monkeypatch.setattr(run_status, "write_text", fail)
    with run_state_recorded(tmp_path), heartbeats_written(tmp_path):
        update_status(tmp_path, epoch=1)


def test_a_folder_that_has_gone_or_holds_something_else_ends_no_run(tmp_path):
    update_status(tmp_path / "gone", epoch=1)
    (tmp_path / "status.json").mkdir()
    update_status(tmp_path, epoch=1)
    assert read_status(tmp_path) == {}


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"state": 3}', '"running"', "\0"])
def test_a_damaged_status_is_none_and_is_replaced(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    assert not is_alive(read_status(tmp_path), heartbeat_age=0)
    update_status(tmp_path, state="running")
    assert read_status(tmp_path)["state"] == "running"


def test_heartbeats_go_on_without_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(run_status, "SECONDS_BETWEEN_HEARTBEATS", 0.01)
    update_status(tmp_path, epoch=3)
    with heartbeats_written(tmp_path):
        first = read_status(tmp_path)["heartbeat"]
        deadline = time.monotonic() + 30
        while read_status(tmp_path)["heartbeat"] == first:
            assert time.monotonic() < deadline
    last = read_status(tmp_path)
    assert last["epoch"] == 3
    time.sleep(0.05)
    assert read_status(tmp_path) == last, "no heartbeat after the end"


def test_a_dead_process_is_not_alive_here_and_looks_alive_elsewhere_for_a_while():
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    status = {"state": "running", "pid": dead.pid, "host": run_status.socket.gethostname()}
    assert not is_alive(status, heartbeat_age=0)
    assert is_alive(status | {"host": "elsewhere"}, heartbeat_age=0)
    assert not is_alive(status | {"host": "elsewhere"}, heartbeat_age=121)
    assert not is_alive(status | {"pid": os.getpid()}, heartbeat_age=121), "the number is used again"
