"""A run that is killed and started again ends with the same outcome as one without interruption, bit for bit."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deepclust.errors import InputError
from deepclust.runs.checkpoint import load_checkpoint
from deepclust.runs.run_folder import acquire_run_lock
from tests.conftest import SMALL_RUN
from tests.processes import PROGRAM, lock_shared_folder, run_deepclust

TRAIN_ARGUMENTS = [
    "train",
    "hardware=cpu",
    "trainer.max_epochs=6",
    "method.hidden_size=64",
    "method.embedding_size=32",
    "method.warmup_epochs=2",
    "method.balanced_sampling=true",
    "callbacks.checkpoint.min_seconds=0",
    "callbacks.checkpoint.every_n_steps=3",
    "callbacks.evaluation.every_n_epochs=2",
    "report.map_points=0",
]


def start_training(folder: Path, *overrides: str, program: str = PROGRAM, environment: dict[str, str] | None = None):
    return subprocess.Popen(
        [sys.executable, "-c", program, *TRAIN_ARGUMENTS, *overrides, f"hydra.run.dir={folder}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_to_end(folder: Path, *overrides: str) -> str:
    """Train, or resume, and return what is printed."""
    process = start_training(folder, *overrides)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def read_outcome(folder: Path) -> tuple[dict, str, dict]:
    """Return the state of the method, the assignments and the results of a finished run."""
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    results = json.loads((folder / "results.json").read_text())
    return (
        state,
        (folder / "assignments.csv").read_text(),
        {k: results[k] for k in ("scores", "health", "steps")},
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with lock_shared_folder(tmp_path_factory, "uninterrupted") as folder:
        if not (folder / "results.json").exists():
            train_to_end(folder)
    return folder


def assert_same_outcome(expected_folder: Path, folder: Path) -> None:
    expected_state, expected_assignments, expected_results = read_outcome(expected_folder)
    state, assignments, results = read_outcome(folder)
    assert state.keys() == expected_state.keys()
    for name in state:
        assert torch.equal(state[name], expected_state[name]), name
    assert assignments == expected_assignments
    assert results == expected_results
    expected_steps, steps = (
        [row["step"] for row in csv.DictReader((f / "metrics.csv").open())] for f in (expected_folder, folder)
    )
    assert steps == expected_steps, "metrics.csv has the same rows, none twice"


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "max_kills"), [(0, 2), (1, 3), (2, 3)])
def test_killed_at_random_moments(uninterrupted, tmp_path, seed, max_kills):
    delays = random.Random(seed)
    kills, printed = 0, ""
    while not (tmp_path / "results.json").exists():
        process = start_training(tmp_path)
        checkpoint = tmp_path / "checkpoints/last.ckpt"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        # Wait for a new checkpoint, then for a random time, so that the kill comes anywhere in a step, a checkpoint or
        # an E-step. After `max_kills` the run may end.
        while process.poll() is None and kills < max_kills:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
                time.sleep(delays.uniform(0, 0.5))
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        printed += process.communicate(timeout=300)[0]
    assert kills >= 1
    assert "goes on at epoch" in printed
    assert_same_outcome(uninterrupted, tmp_path)


def test_a_finished_run_is_not_changed(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name in ("results.json", "last.ckpt")}
    assert "finished already" in train_to_end(folder)
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.slow
def test_killed_after_the_last_epoch(uninterrupted, tmp_path):
    """Between the last checkpoint and results.json nothing is left to train; everything after it is done again."""
    train_to_end(tmp_path)
    (tmp_path / "results.json").unlink()
    train_to_end(tmp_path)
    assert_same_outcome(uninterrupted, tmp_path)


@pytest.mark.parametrize(
    "changed", ["backbone.widths=[16,16]", pytest.param("drop_last=false", marks=pytest.mark.slow)]
)
def test_another_recipe_is_refused(uninterrupted, tmp_path, changed):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").write_bytes((uninterrupted / "checkpoints/last.ckpt").read_bytes())
    process = start_training(tmp_path, changed)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.count("\n") == 1 and changed.partition("=")[0] in err and "start in another folder" in err


def test_a_finished_run_of_another_recipe_is_refused(uninterrupted, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/last.ckpt", "results.json"):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    process = start_training(tmp_path, "seed=7")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "seed=0" in err and "start in another folder" in err


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_named(uninterrupted, tmp_path, damage):
    whole = (uninterrupted / "checkpoints/last.ckpt").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(b ^ 255 for b in whole[middle : middle + 100]) + whole[middle + 100 :]
    (tmp_path / "checkpoints").mkdir()
    content = {"cut": whole[:middle], "flipped": flipped, "empty": b""}[damage]
    (tmp_path / "checkpoints/last.ckpt").write_bytes(content)
    with pytest.raises(InputError, match=r"last\.ckpt is damaged"):
        load_checkpoint(tmp_path)


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    with acquire_run_lock(tmp_path), pytest.raises(InputError, match="another process"), acquire_run_lock(tmp_path):
        pass
    with acquire_run_lock(tmp_path):
        pass


@pytest.mark.slow
def test_in_float64_no_digit_is_lost(tmp_path):
    settings = [*SMALL_RUN, "report.map_points=0", "batch_size=600", "hardware.precision=64-true"]
    settings += ["callbacks.checkpoint.every_n_steps=1"]
    run_deepclust("train", *settings, f"hydra.run.dir={tmp_path / 'whole'}")
    stopped = [*settings, f"hydra.run.dir={tmp_path / 'stopped'}"]
    end = "+callbacks.stop={_target_: tests.datasets.stop_at_step.StopAtStep, step: 3}"
    assert run_deepclust("train", *stopped, end, check=False).returncode == 9
    assert not (tmp_path / "stopped/results.json").exists()
    run_deepclust("train", *stopped)
    whole, resumed = (load_checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "stopped"))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
