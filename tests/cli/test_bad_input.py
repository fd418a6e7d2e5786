"""What a user can get wrong is reported in one line, with exit code 2, before hours are spent."""

import csv
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deepclust.cli.main import main
from deepclust.commands.train import run
from deepclust.errors import InputError
from deepclust.runs.assignments_csv import read_assignments
from deepclust.runs.checkpoint import load_checkpoint
from deepclust.runs.run_folder import CHECKPOINT
from tests.conftest import compose_train
from tests.processes import run_deepclust

EXPECTED_PARTS_OF_MESSAGES = {
    "method=propso": ["propso", "propos"],
    "trainer.max_epoch=3": ["trainer.max_epochs"],
    "dataset=usps data_dir=/nowhere": ["/nowhere/usps", "train_images.npy"],
    "dataset.num_clusters=2000": ["2000", "1797"],
    "batch_size=5000": ["5000", "1797"],
    "batch_size=0": ["batch_size is 0", "1 or more"],
    "batch_size=-5": ["batch_size is -5"],
    "batch_size=1.5": ["batch_size is 1.5", "whole number"],
    "clean_batch_size=0": ["clean_batch_size is 0"],
    "seed=abc": ["seed is 'abc'", "whole number"],
    "seed=99999999999999999999": ["2^63"],
    "trainer.max_epochs=-1": ["trainer.max_epochs is -1", "0 or more"],
    "method=scan before.batch_size=0": ["before.batch_size is 0"],
    "dataset=folder dataset.path=/nowhere dataset.num_clusters=3": ["/nowhere"],
    "dataset=folder dataset.num_clusters=3": ["dataset.path"],
    "method.temperature=warm": ["method.temperature"],
    "view_names=[weak,sharp]": ["sharp"],
}


def run_accepted(monkeypatch, capfd, *arguments: str) -> str:
    """Run a command in this process, and return what it printed."""
    monkeypatch.setattr(sys, "argv", ["deepclust", *arguments])
    assert main() == 0
    return capfd.readouterr().out


def run_refused(monkeypatch, capfd, *arguments: str) -> str:
    """Run a command that is refused, and return the message on standard error."""
    monkeypatch.setattr(sys, "argv", ["deepclust", *arguments])
    assert main() == 2
    message = capfd.readouterr().err
    assert message.startswith("deepclust: error: ") and message.count("\n") == 1, message
    assert message.count("; ") >= 2, "what, what was expected, what to do"
    return message


@pytest.mark.parametrize("overrides", EXPECTED_PARTS_OF_MESSAGES)
def test_one_line_and_exit_code_2(overrides, tmp_path, monkeypatch, capfd):
    message = run_refused(monkeypatch, capfd, "train", *overrides.split(), f"hydra.run.dir={tmp_path}")
    for part in EXPECTED_PARTS_OF_MESSAGES[overrides]:
        assert part in message


def test_no_readable_image(tmp_path, monkeypatch, capfd):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/broken.jpg").write_bytes(b"no image")
    arguments = ["dataset=folder", f"dataset.path={tmp_path / 'images'}", "dataset.num_clusters=2"]
    folders = [f"data_dir={tmp_path}", f"hydra.run.dir={tmp_path / 'run'}"]
    assert "images" in run_refused(monkeypatch, capfd, "train", *arguments, *folders)


def test_nan_stops_the_training_at_once(train_small, monkeypatch):
    from deepclust.methods import propos

    original_loss, calls = propos.alignment_loss, []

    def loss_with_nan(prediction, target):
        calls.append(1)
        return original_loss(prediction, target) * (float("nan") if len(calls) == 10 else 1.0)

    monkeypatch.setattr(propos, "alignment_loss", loss_with_nan)
    with pytest.raises(InputError, match="loss of step 10 is not a finite number"):
        train_small("method.step_order=joint")
    assert len(calls) == 10


def test_after_a_bad_loss_the_checkpoint_is_that_of_the_previous_epoch(tmp_path, train_small, monkeypatch):
    from deepclust.methods import propos

    original_loss, calls = propos.alignment_loss, []

    def loss_with_infinity(prediction, target):
        calls.append(1)
        return original_loss(prediction, target) / (0.0 if len(calls) == 10 else 1.0)

    monkeypatch.setattr(propos, "alignment_loss", loss_with_infinity)
    with pytest.raises(InputError):
        train_small("method.step_order=joint")
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint["global_step"] == 7
    assert all(torch.isfinite(v).all() for v in checkpoint["state_dict"].values() if v.is_floating_point())


def test_predict_and_evaluate_repeat_the_run(tmp_path, train_small, monkeypatch, capfd):
    results, folder = train_small()
    from sklearn.datasets import load_digits

    np.save(tmp_path / "digits.npy", np.rint(load_digits().images * (255 / 16)).astype(np.uint8))
    output = tmp_path / "new/out.csv"
    run_accepted(
        monkeypatch, capfd, "predict", f"run={folder}", f"images={tmp_path / 'digits.npy'}", f"output={output}"
    )
    predicted, recorded = (list(csv.DictReader(path.open())) for path in (output, folder / "assignments.csv"))
    assert [(r["index"], r["cluster"]) for r in predicted] == [(r["index"], r["cluster"]) for r in recorded]
    assert all(
        abs(float(a["confidence"]) - float(b["confidence"])) < 1e-4 for a, b in zip(predicted, recorded, strict=True)
    )
    assert all(0 < float(r["distance"]) < 1e3 for r in predicted)
    printed = run_accepted(monkeypatch, capfd, "evaluate", f"run={folder}")
    for rule in ("method", "kmeans"):
        assert f'"acc": {results["scores"][rule]["acc"]}' in printed


def test_predict_sorts_files_into_folders(tmp_path, train_small, monkeypatch, capfd):
    _, folder = train_small()
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (6, 9, 11), np.uint8)):
        Image.fromarray(pixels).save(photos / f"{number}.png")
    (photos / "broken.png").write_bytes(b"no image")
    output, sorted_to = tmp_path / "out.csv", tmp_path / "sorted"
    arguments = [f"run={folder}", f"images={photos}"]
    run_accepted(monkeypatch, capfd, "predict", *arguments, f"output={output}", f"sort_to={sorted_to}")
    rows = list(csv.DictReader(output.open()))
    assert len(rows) == 6 and "broken.png" in (tmp_path / "out.csv.unreadable.txt").read_text()
    for row in rows:
        copy = sorted_to / f"cluster_{int(row['cluster']):03d}" / f"{int(row['index']):06d}_{Path(row['path']).name}"
        assert copy.read_bytes() == Path(row["path"]).read_bytes()
    assert len(list(sorted_to.rglob("*.png"))) == 6
    message = run_refused(
        monkeypatch, capfd, "predict", *arguments, f"output={tmp_path}/new.csv", f"sort_to={sorted_to}"
    )
    assert f"{sorted_to} is not empty" in message
    assert not (tmp_path / "new.csv").exists()
    (photos / "broken.png").unlink()
    run_accepted(monkeypatch, capfd, "predict", *arguments, f"output={output}", f"sort_to={tmp_path}/other")
    assert not (tmp_path / "out.csv.unreadable.txt").exists()


@pytest.mark.slow
def test_file_names_that_are_not_utf8_are_kept_byte_for_byte(tmp_path, train_small):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (40, 16, 16), np.uint8)):
        Image.fromarray(pixels).save(photos / os.fsdecode(b"%02d\xff.png" % number))
    (photos / os.fsdecode(b"broken\xff.png")).write_bytes(b"no image")
    overrides = ["dataset=folder", f"dataset.path={photos}", f"data_dir={tmp_path}/data", "dataset.num_clusters=3"]
    _, folder = train_small(*overrides, "dataset.image_size=16", "batch_size=20")
    names = sorted(name for name in os.listdir(os.fsencode(photos)) if not name.startswith(b"broken"))
    output, sorted_to = tmp_path / "out.csv", tmp_path / "sorted"
    run_deepclust("predict", f"run={folder}", f"images={photos}", f"output={output}", f"sort_to={sorted_to}")
    for file in (folder / "assignments.csv", output):
        lines = file.read_bytes().splitlines()[1:]
        assert [line.rpartition(b",")[2].rpartition(b"/")[2] for line in lines] == names
    assert b"/broken\xff.png\t" in (tmp_path / "out.csv.unreadable.txt").read_bytes()
    assert sorted(os.fsencode(copy.name)[7:] for copy in sorted_to.rglob("*.png")) == names
    assert len(read_assignments(folder)["cluster"]) == 40
    assert re.search(r"\d\d\?\.png", (folder / "report.html").read_text())


def test_predict_refuses_runs_that_it_cannot_use(tmp_path, train_small, monkeypatch, capfd):
    _, folder = train_small("trainer.max_epochs=1")
    arguments = [f"images={tmp_path}", f"output={tmp_path}/out.csv"]
    checkpoint = load_checkpoint(folder)  # as it is saved during training
    torch.save({k: v for k, v in checkpoint.items() if k != "cluster_means" and "kmeans" not in k}, folder / CHECKPOINT)
    assert "is not a finished run" in run_refused(monkeypatch, capfd, "predict", f"run={folder}", *arguments)
    np.save(tmp_path / "train_features.npy", np.random.default_rng(0).normal(size=(60, 5)).astype("f4"))
    vectors = ["dataset=features", f"dataset.path={tmp_path}", "dataset.num_clusters=3", "report.map_points=0"]
    run(compose_train(*vectors, "method=kmeans", "hardware=cpu", "batch_size=20"), tmp_path)
    np.save(tmp_path / "others.npy", np.zeros((4, 7), "f4"))
    arguments[0] = f"images={tmp_path}/others.npy"
    assert "holds vectors of 7 numbers" in run_refused(monkeypatch, capfd, "predict", f"run={tmp_path}", *arguments)
    assert not list(tmp_path.glob("out.csv*"))


@pytest.mark.slow
def test_evaluate_warns_if_an_image_is_missing(tmp_path, train_small):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (40, 16, 16), np.uint8)):
        Image.fromarray(pixels).save(photos / f"{number}.png")
    overrides = ["dataset=folder", f"dataset.path={photos}", f"data_dir={tmp_path}/data", "dataset.num_clusters=3"]
    _, folder = train_small(*overrides, "dataset.image_size=16", "batch_size=20", "trainer.max_epochs=1")
    assert "the run had" not in run_deepclust("evaluate", f"run={folder}").stderr
    (photos / "7.png").unlink()
    done = run_deepclust("evaluate", f"run={folder}")
    assert "the run had 40 images and there are 39 now" in done.stderr
    assert json.loads(done.stdout)["run"] == str(folder)


def test_evaluate_refuses_a_folder_without_a_run(tmp_path, monkeypatch, capfd):
    assert "last.ckpt" in run_refused(monkeypatch, capfd, "evaluate", f"run={tmp_path}")
