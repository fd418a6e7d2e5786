"""The benchmarks run, and what they hold our training against does the same mathematics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepclust.engine import cuda_graphs
from tests.cuda_graph_stand_in import Tape, stand_in

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.slow


def figures(tmp_path: Path, script: str, *arguments: str) -> dict:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["machine"]["commit"] is None or found["machine"]["commit"]
    return found


@pytest.mark.parametrize("step_order", ["joint", "two_pass"])
def test_propos_by_hand_learns_what_propos_learns(tmp_path, step_order):
    arguments = ["--methods", "propos", "--batches", "3", "--rounds", "2", "dataset=digits", "hardware=cpu"]
    exact = [f"method.step_order={step_order}", "hardware.precision=64-true"]
    found = figures(tmp_path, "step.py", *arguments, *exact)["methods"]["propos"]
    assert found["by_hand_weights_differ_by"] < 1e-9
    assert {len(taken) for taken in found["rounds"].values()} == {2} and len(found["rounds"]) == 3
    assert sum(found["parts"].values()) == pytest.approx(found["seconds_per_step"]["framework"], rel=1)
    assert found["flops_per_step"] > 0


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("views.py", ["--images", "32", "--rounds", "1"]),
        ("startup.py", ["--rounds", "1"]),
        ("baseline.py", ["--batches", "2", "--rounds", "1", "--workers", "1", "dataset=digits", "hardware=cpu"]),
        (
            "time_to_score.py",
            ["--acc", "0.1", "--rule", "kmeans", "method=cc", "dataset=digits", "hardware=cpu"],
        ),
    ],
)
def test_runs_and_writes_its_figures(tmp_path, script, arguments):
    figures(tmp_path, script, *arguments)


@pytest.mark.parametrize("method", ["propos", "gcc"])
def test_nothing_is_waited_for_while_a_graph_is_recorded(method, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step

    recording, recorded = [], []

    class Recording(Tape):
        def __init__(self, *given):
            recording.append(self)
            super().__init__(*given)
            recorded.append(recording.pop())

    def wait(device):
        assert not recording

    stand_in(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "Graph", Recording)
    monkeypatch.setattr(step, "wait", wait)
    cfg = step.configuration(method, ["dataset=digits", "hardware=cpu", "hardware.graphs=true"], 3, 3, tmp_path)
    work = step.Work(cfg)
    split = step.Split(work.method)
    work.trainer(tmp_path, profiler=split).fit(work.method, work.datamodule)
    assert recorded and min(split.parts(3).values()) > 0
