"""The same command twice finds the finished run, whatever the command has left open; another recipe is refused."""

import shlex
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from deepclust.cli.main import main
from deepclust.runs.checkpoint import load_checkpoint
from deepclust.runs.resume_checks import OPEN_DATASET_KEYS, find_differences
from tests.conftest import compose_train

SMALL = ["hardware=cpu", "backbone=conv_small", "views=digits", "batch_size=64", "trainer.max_epochs=1"]
SMALL += ["report.map_points=0"]
COMMANDS = {
    "arrays": ["dataset=arrays", "dataset.path=A.npz", "method=cc", *SMALL],
    "arrays_with_stage": [
        *("dataset=arrays", "dataset.path=A.npz", "method=scan", *SMALL, "method.num_neighbors=5"),
        *("before.trainer.max_epochs=1", "before.batch_size=64"),
    ],
    "folder": [
        *("dataset=folder", "dataset.path=F", "dataset.num_clusters=3", "data_dir=data", "method=cc", *SMALL),
        "dataset.image_size=16",
    ],
    "features": [
        *("dataset=features", "dataset.path=V", "dataset.num_clusters=4", "method=lnscc", "batch_size=40"),
        *("hardware=cpu", "trainer.max_epochs=1", "report.map_points=0", "method.centres_after_epochs=0"),
        *("method.clustering_after_epochs=0", "method.num_neighbors=5"),
    ],
    "estimated": [
        *("dataset=features", "dataset.path=V", "dataset.num_clusters=auto", "method=kmeans", "batch_size=40"),
        *("hardware=cpu", "report.map_points=0"),
    ],
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A working folder with an array file, a folder of images and vectors."""
    from PIL import Image

    digits = load_digits()
    images = np.rint(digits.images[:160] * 15.9).astype(np.uint8)
    np.savez(tmp_path / "A.npz", images=images, labels=digits.target[:160])
    for number, image in enumerate(images[:80]):
        (tmp_path / "F").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"F/{number}.png")
    (tmp_path / "V").mkdir()
    centres = np.random.default_rng(0).normal(size=(4, 6)) * 20
    vectors = centres[np.arange(160) % 4] + np.random.default_rng(1).normal(size=(160, 6))
    np.save(tmp_path / "V/train_features.npy", vectors.astype("f4"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_in_this_process(monkeypatch, capfd, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["deepclust", *arguments])
    code = main()
    output = capfd.readouterr()
    return code, output.out, output.err


@pytest.mark.parametrize("name", COMMANDS)
def test_same_command_finds_the_finished_run(name, data, monkeypatch, capfd):
    command = ["train", *COMMANDS[name], "hydra.run.dir=run"]
    code, _, message = run_in_this_process(monkeypatch, capfd, *command)
    assert code == 0, message
    before = {path: path.stat().st_mtime_ns for path in data.glob("run/**/*") if path.suffix in (".json", ".ckpt")}
    assert len(before) >= 2
    code, out, message = run_in_this_process(monkeypatch, capfd, *command)
    assert code == 0 and "finished already" in out, message
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # What was open stays within the keys that may be left open.
    checkpoint = load_checkpoint(data / "run")
    open_keys = {k for k, v in compose_train(*COMMANDS[name]).dataset.items() if v in (None, "auto")}
    assert {key for key in open_keys if checkpoint["config"]["dataset"][key] is not None} <= {*OPEN_DATASET_KEYS}


def test_advice_of_a_refused_run_works_when_followed(data, monkeypatch, capfd):
    command = ["train", *COMMANDS["arrays"], "hydra.run.dir=run"]
    assert run_in_this_process(monkeypatch, capfd, *command)[0] == 0
    for change in (
        *("multi_view.std=[0.5]", "backbone.widths=[32,32,64,32]", "view_names=[weak]", "seed=3"),
        *("drop_last=false", "dataset.num_clusters=9", "method.embedding_size=64"),
    ):
        code, _, message = run_in_this_process(monkeypatch, capfd, *command, change)
        assert code == 2 and message.count("\n") == 1, change
        assert "None" not in message and "True" not in message, message
        advice = shlex.split(message.rpartition("; set ")[2].partition(", or start in another folder")[0])
        code, out, message = run_in_this_process(monkeypatch, capfd, *command, change, *advice)
        assert code == 0 and "finished already" in out, (change, advice, message)


def test_sweep_that_grows_adds_the_new_jobs_only(data, monkeypatch, capfd):
    command = ["train", "-m", *COMMANDS["features"], "hydra.sweep.dir=sweep"]
    assert run_in_this_process(monkeypatch, capfd, *command, "seed=0,1")[0] == 0
    files = {path: path.stat().st_mtime_ns for path in data.glob("sweep/*/results.json")}
    assert len(files) == 2
    code, _, message = run_in_this_process(monkeypatch, capfd, *command, "seed=0,1,2")
    assert code == 0, message
    assert {path: path.stat().st_mtime_ns for path in files} == files and len([*data.glob("sweep/*/results.json")]) == 3


def test_differences_are_leaves():
    saved = {"a": [{"size": 8, "p": 0.5}, {}], "b": {"c": None}, "n": float("nan"), "l": [1, 2], "e": []}
    same = {"a": [{"size": 8, "p": 0.5}, {}], "b": {}, "n": float("nan"), "l": [1, 2], "e": []}
    assert [*find_differences(saved, same)] == []
    other = {"a": [{"size": None, "p": 0.5}, {}], "b": {"c": 1}, "n": 1, "l": [1], "e": None}
    assert [key for key, _, _ in find_differences(saved, other)] == ["a.0.size", "b.c", "n", "l", "e"]
