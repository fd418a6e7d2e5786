"""Progress as it is seen: on a terminal, in a file, and when work ends soon or goes wrong."""

import json
import os
import pty
import re
import subprocess
import sys
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

from deepclust.clustering import neighbors
from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.neighbors import nearest_neighbors
from deepclust.commands.evaluate import main as evaluate
from deepclust.datasets.conversion import write_images
from deepclust.engine import distributed, progress
from deepclust.engine.progress import Work, duration, track

HIDE_CURSOR, SHOW_CURSOR, ERASE_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is told to go on."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    monkeypatch.setattr(progress, "_line_at", -float("inf"))
    return made


def work_through(items, clock, seconds, **said):
    for item in track(items, "sorting", **said):
        clock.now += seconds
        yield item


def test_a_file_gets_a_line_now_and_then(clock, capsys):
    assert list(work_through(range(100), clock, 1)) == list(range(100))
    assert capsys.readouterr().out.splitlines() == [
        "sorting   5%  95 s left",
        "sorting  35%  65 s left",
        "sorting  65%  35 s left",
        "sorting  95%  5 s left",
    ]


def test_short_work_and_its_end_leave_nothing(clock, capsys):
    list(work_through(range(100), clock, 0.04))
    list(work_through(range(1), clock, 60))
    list(work_through([], clock, 60))
    assert capsys.readouterr() == ("", "")


def test_items_count_by_their_size(clock, capsys):
    list(work_through(iter([[0] * 10, [0] * 30, []]), clock, 6, total=80, size=len))
    assert capsys.readouterr().out == "sorting  12%  42 s left\n"


def test_works_within_others_share_the_lines(clock, capsys):
    for _ in work_through(range(10), clock, 0, total=10):
        list(work_through(range(10), clock, 2))  # each is old enough for a line of its own, every six seconds
    said = capsys.readouterr().out.splitlines()
    assert 200 / 30 - 1 <= len(said) <= 200 / 30 + 1


def test_what_was_done_before_is_no_speed(clock, capsys):
    work = Work("training", 100, done=50, line_every=1)
    clock.now += 10
    work.reach(60, lambda: "epoch 6/10")
    assert capsys.readouterr().out == "training  60%  epoch 6/10  40 s left\n"


def test_other_processes_are_silent(clock, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    list(work_through(range(100), clock, 1))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "said"), [(0, "0 s"), (99, "99 s"), (101, "2 min"), (9000, "2.5 h")])
def test_durations(seconds, said):
    assert duration(seconds) == said


PROGRAM = """
import time
from deepclust.engine import progress
from deepclust.engine.progress import track

progress.BAR_AFTER, progress.BAR_EVERY = 0.1, 0.02

list(track(range(1000), "short work"))
print("BEGIN")
for _ in track(range(4), "outer [work]"):
    for _ in track(range(40), "inner work"):
        time.sleep(0.02)
    print("said in between")
print("END")

def fail():
    for number in track(range(100), "outer"):
        for _ in track(range(10), "inner"):
            time.sleep(0.03)
            if number == 2:
                raise ValueError("enough")

try:
    fail()
except ValueError as error:
    kept = error  # and with it every frame
    print("display:", progress._bars)
"""


def test_on_a_terminal():
    ours, theirs = pty.openpty()
    settings = {"TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **settings}
    )
    os.close(theirs)
    read = b""
    try:
        while piece := os.read(ours, 65536):
            read += piece
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    seen = read.decode()
    assert child.wait() == 0, seen

    before, shown, after = re.split("BEGIN\r\n|END\r\n", seen)
    assert before == "", "short work leaves nothing"
    assert "outer [work]" in shown and "inner work" in shown and " 50 %" in shown and re.search(r"\d s left", shown)
    assert shown.count("said in between\r\n") == 4
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) > 0
    left_over = shown.rpartition(ERASE_LINE)[2]
    assert not re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", left_over).strip(), "the bars are gone in the end"
    assert "outer" in after and after.endswith("display: None\r\n"), "an error closes the bars that it passes"
    assert after.count(HIDE_CURSOR) == after.count(SHOW_CURSOR) > 0


@pytest.fixture
def lasting(monkeypatch):
    """A clock by which every step lasts, so that each is shown."""
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=count(1000, 100).__next__))
    monkeypatch.setattr(progress, "_line_at", -float("inf"))


def test_what_takes_long_is_shown(lasting, capsys, tmp_path):
    rows = torch.arange(600.0).reshape(200, 3)
    settings = {"num_clusters": 3, "restarts": [0], "max_iterations": 9, "tolerance": 0.0, "key": (1,)}
    kmeans(rows, metric="euclidean", **settings)
    assert {"k-means, centroids to begin with  33%", "k-means, 9 iterations at most  11%"} <= shares(capsys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "CPU_ELEMENTS", 1)
        nearest_neighbors(rows, rows, 2, metric="euclidean", exclude=None)
    assert {f"nearest neighbours  {share}%" for share in (25, 50, 75)} == shares(capsys)
    chunks = [np.zeros((5, 2, 2, 1), np.uint8)] * 2
    write_images(tmp_path / "a.npy", iter(chunks), shape=(2, 2, 1), total=10)
    assert shares(capsys) == {"writing a.npy  50%"}


def shares(capsys) -> set[str]:
    return {line.rpartition("  ")[0] for line in capsys.readouterr().out.splitlines()}


def test_evaluate_keeps_standard_output_for_its_answer(lasting, capsys, run_small):
    results, folder = run_small("trainer.max_epochs=1")
    assert "features of all images" in capsys.readouterr().out
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        evaluate(compose("evaluate", overrides=[f"run={folder}", "accelerator=cpu"]))
    said = capsys.readouterr()
    assert json.loads(said.out)["scores"] == results["scores"]
    assert "features of all images" in said.err and "k-means" in said.err
