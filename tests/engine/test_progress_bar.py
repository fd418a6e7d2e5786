"""Progress on a terminal and in a file, of work that is short, nested or interrupted by an error."""

import json
import os
import pty
import re
import subprocess
import sys
import time
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
from deepclust.datasets.one_time_conversion import write_image_array
from deepclust.engine import distributed, progress_bar
from deepclust.engine.durations import format_duration
from deepclust.engine.progress_bar import ProgressMeter, track

HIDE_CURSOR, SHOW_CURSOR, ERASE_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress_bar, "time", clock)
    monkeypatch.setattr(progress_bar, "_last_line_at", -float("inf"))
    return clock


def iterate_slowly(items, clock, seconds, **arguments):
    """Track items, each of which takes so many seconds."""
    for item in track(items, "sorting", **arguments):
        clock.now += seconds
        yield item


def test_a_file_gets_a_line_every_half_minute(clock, capsys):
    assert list(iterate_slowly(range(100), clock, 1)) == list(range(100))
    assert capsys.readouterr().out.splitlines() == [
        "sorting   5%  95 s left",
        "sorting  35%  65 s left",
        "sorting  65%  35 s left",
        "sorting  95%  5 s left",
    ]


def test_short_work_and_the_end_of_work_print_nothing(clock, capsys):
    list(iterate_slowly(range(100), clock, 0.04))
    list(iterate_slowly(range(1), clock, 60))
    list(iterate_slowly([], clock, 60))
    assert capsys.readouterr() == ("", "")


def test_items_count_by_their_size(clock, capsys):
    list(iterate_slowly(iter([[0] * 10, [0] * 30, []]), clock, 6, total=80, size=len))
    assert capsys.readouterr().out == "sorting  12%  42 s left\n"


def test_nested_works_share_the_lines(clock, capsys):
    for _ in iterate_slowly(range(10), clock, 0, total=10):
        list(iterate_slowly(range(10), clock, 2))  # each is old enough for a line of its own, every six seconds
    lines = capsys.readouterr().out.splitlines()
    assert 200 / 30 - 1 <= len(lines) <= 200 / 30 + 1


def test_steps_done_before_do_not_count_as_speed(clock, capsys):
    meter = ProgressMeter("training", 100, done=50, seconds_between_lines=1)
    clock.now += 10
    meter.update(60, lambda: "epoch 6/10")
    assert capsys.readouterr().out == "training  60%  epoch 6/10  40 s left\n"


def test_other_processes_print_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    list(iterate_slowly(range(100), clock, 1))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (99, "99 s"), (101, "2 min"), (9000, "2.5 h")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


PROGRAM = """
import time
from deepclust.engine import progress_bar
from deepclust.engine.progress_bar import track

progress_bar.SECONDS_BEFORE_BAR, progress_bar.SECONDS_BETWEEN_UPDATES = 0.1, 0.02

list(track(range(1000), "short work"))
print("BEGIN")
for _ in track(range(4), "outer [work]"):
    for _ in track(range(40), "inner work"):
        time.sleep(0.02)
    print("printed in between")
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
    kept_error = error  # and with it every frame, so that nothing is closed by the garbage collector
    print("display:", progress_bar._live_display)
"""


def test_on_a_terminal():
    controller, terminal = pty.openpty()
    settings = {"TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, **settings},
    )
    os.close(terminal)
    output = b""
    try:
        while chunk := os.read(controller, 65536):
            output += chunk
    except OSError:  # Linux raises it when the other side is closed
        pass
    os.close(controller)
    text = output.decode()
    assert child.wait() == 0, text

    before, shown, after = re.split("BEGIN\r\n|END\r\n", text)
    assert before == "", "short work leaves nothing"
    assert "outer [work]" in shown and "inner work" in shown and " 50 %" in shown and re.search(r"\d s left", shown)
    assert shown.count("printed in between\r\n") == 4
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) > 0
    last_text = shown.rpartition(ERASE_LINE)[2]
    assert not re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last_text).strip(), "the bars are removed at the end"
    assert "outer" in after and after.endswith("display: None\r\n"), "an error closes the bars that it passes"
    assert after.count(HIDE_CURSOR) == after.count(SHOW_CURSOR) > 0


@pytest.fixture
def slow_clock(monkeypatch):
    """A clock by which every step takes 100 seconds, so that each is shown."""
    monkeypatch.setattr(progress_bar, "time", SimpleNamespace(monotonic=count(1000, 100).__next__))
    monkeypatch.setattr(progress_bar, "_last_line_at", -float("inf"))


def test_long_operations_show_their_progress(slow_clock, capsys, tmp_path):
    rows = torch.arange(600.0).reshape(200, 3)
    settings = {"num_clusters": 3, "restarts": [0], "max_iterations": 9, "tolerance": 0.0, "key": (1,)}
    kmeans(rows, metric="euclidean", **settings)
    assert {"k-means++ seeding  33%", "k-means (at most 9 iterations)  11%"} <= printed_shares(capsys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "CPU_CHUNK_PRODUCTS", 1)
        nearest_neighbors(rows, rows, 2, metric="euclidean", exclude=None)
    assert {f"nearest neighbours  {share}%" for share in (25, 50, 75)} == printed_shares(capsys)
    chunks = [np.zeros((5, 2, 2, 1), np.uint8)] * 2
    write_image_array(tmp_path / "a.npy", iter(chunks), shape=(2, 2, 1), total=10)
    assert printed_shares(capsys) == {"writing a.npy  50%"}


def printed_shares(capsys) -> set[str]:
    """The printed lines without the time that is left."""
    return {line.rpartition("  ")[0] for line in capsys.readouterr().out.splitlines()}


def test_evaluate_keeps_standard_output_for_its_result(slow_clock, capsys, train_small):
    results, folder = train_small("trainer.max_epochs=1")
    assert "features of all images" in capsys.readouterr().out
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        evaluate(compose("evaluate", overrides=[f"run={folder}", "accelerator=cpu"]))
    printed = capsys.readouterr()
    assert json.loads(printed.out)["scores"] == results["scores"]
    assert "features of all images" in printed.err and "k-means" in printed.err


def test_work_that_cannot_tell_how_far_it_is_is_announced(monkeypatch, capsys):
    monkeypatch.setattr(progress_bar, "SECONDS_BEFORE_LINE", 0.05)
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 100.0)
    with progress_bar.announce("map"):
        pass
    assert capsys.readouterr().out == "", "short work shows nothing"
    with progress_bar.announce("map"):
        time.sleep(0.5)
    assert capsys.readouterr().out == "map: 0 s so far\n"
