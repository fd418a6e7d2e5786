"""What a user can get wrong: one line, exit code 2, before hours are spent."""

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
from deepclust.runs.assignments import read_clusters
from deepclust.runs.checkpoint import load_checkpoint
from deepclust.runs.folder import CHECKPOINT
from tests.conftest import compose_train
from tests.engine.test_launch import deepclust

CASES = {
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


def refused(monkeypatch, capfd, *arguments: str) -> str:
    """What the command line says on standard error of a command that it refuses."""
    monkeypatch.setattr(sys, "argv", ["deepclust", *arguments])
    assert main() == 2
    said = capfd.readouterr().err
    assert said.startswith("deepclust: error: ") and said.count("\n") == 1, said
    assert said.count("; ") >= 2, "what, what was expected, what to do"
    return said


@pytest.mark.parametrize("overrides", CASES)
def test_one_line_and_exit_code_2(overrides, tmp_path, monkeypatch, capfd):
    said = refused(monkeypatch, capfd, "train", *overrides.split(), f"hydra.run.dir={tmp_path}")
    for word in CASES[overrides]:
        assert word in said


def test_no_readable_image(tmp_path, monkeypatch, capfd):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/broken.jpg").write_bytes(b"no image")
    arguments = ["dataset=folder", f"dataset.path={tmp_path / 'images'}", "dataset.num_clusters=2"]
    where = [f"data_dir={tmp_path}", f"hydra.run.dir={tmp_path / 'run'}"]
    assert "images" in refused(monkeypatch, capfd, "train", *arguments, *where)


def test_nan_stops_at_once_and_the_last_good_checkpoint_stays(run_small, monkeypatch):
    from deepclust.methods import propos

    honest, calls = propos.alignment, []

    def breaks(prediction, target):
        calls.append(1)
        return honest(prediction, target) * (float("nan") if len(calls) == 10 else 1.0)

    monkeypatch.setattr(propos, "alignment", breaks)
    with pytest.raises(InputError, match="loss of step 10 is not a finite number"):
        run_small("method.step_order=joint")
    assert len(calls) == 10


def test_after_a_nan_the_checkpoint_is_that_of_the_epoch_before(tmp_path, run_small, monkeypatch):
    from deepclust.methods import propos

    honest, calls = propos.alignment, []
    monkeypatch.setattr(
        propos,
        "alignment",
        lambda p, t: (calls.append(1), honest(p, t) / (0.0 if len(calls) == 10 else 1.0))[1],
    )
    with pytest.raises(InputError):
        run_small("method.step_order=joint")
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint["global_step"] == 7
    assert all(torch.isfinite(v).all() for v in checkpoint["state_dict"].values() if v.is_floating_point())


def test_predict_and_evaluate_repeat_the_run(tmp_path, run_small, capsys):
    results, folder = run_small()
    from sklearn.datasets import load_digits

    np.save(tmp_path / "digits.npy", np.rint(load_digits().images * (255 / 16)).astype(np.uint8))
    output = tmp_path / "new/out.csv"
    deepclust("predict", f"run={folder}", f"images={tmp_path / 'digits.npy'}", f"output={output}")
    told, kept = (list(csv.DictReader(path.open())) for path in (output, folder / "assignments.csv"))
    assert [(r["index"], r["cluster"]) for r in told] == [(r["index"], r["cluster"]) for r in kept]
    assert all(abs(float(a["confidence"]) - float(b["confidence"])) < 1e-4 for a, b in zip(told, kept, strict=True))
    assert all(0 < float(r["distance"]) < 1e3 for r in told)
    done = deepclust("evaluate", f"run={folder}")
    for rule in ("method", "kmeans"):
        assert f'"acc": {results["scores"][rule]["acc"]}' in done.stdout


def test_predict_sorts_files_into_folders(tmp_path, run_small, monkeypatch, capfd):
    _, folder = run_small()
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (6, 9, 11), np.uint8)):
        Image.fromarray(pixels).save(photos / f"{number}.png")
    (photos / "broken.png").write_bytes(b"no image")
    output, sorted_to = tmp_path / "out.csv", tmp_path / "sorted"
    deepclust("predict", f"run={folder}", f"images={photos}", f"output={output}", f"sort_to={sorted_to}")
    rows = list(csv.DictReader(output.open()))
    assert len(rows) == 6 and "broken.png" in (tmp_path / "out.csv.unreadable.txt").read_text()
    for row in rows:
        copy = sorted_to / f"cluster_{int(row['cluster']):03d}" / f"{int(row['index']):06d}_{Path(row['path']).name}"
        assert copy.read_bytes() == Path(row["path"]).read_bytes()
    assert len(list(sorted_to.rglob("*.png"))) == 6
    again = [f"run={folder}", f"images={photos}", f"sort_to={sorted_to}"]
    assert f"{sorted_to} is not empty" in refused(monkeypatch, capfd, "predict", *again, f"output={tmp_path}/new.csv")
    assert not (tmp_path / "new.csv").exists()
    (photos / "broken.png").unlink()
    deepclust("predict", f"run={folder}", f"images={photos}", f"output={output}", f"sort_to={tmp_path}/other")
    assert not (tmp_path / "out.csv.unreadable.txt").exists()


def test_names_that_are_no_utf8_come_back_byte_for_byte(tmp_path, run_small):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (40, 16, 16), np.uint8)):
        Image.fromarray(pixels).save(photos / os.fsdecode(b"%02d\xff.png" % number))
    (photos / os.fsdecode(b"broken\xff.png")).write_bytes(b"no image")
    given = ["dataset=folder", f"dataset.path={photos}", f"data_dir={tmp_path}/data", "dataset.num_clusters=3"]
    _, folder = run_small(*given, "dataset.image_size=16", "batch_size=20")
    names = sorted(name for name in os.listdir(os.fsencode(photos)) if not name.startswith(b"broken"))
    output, sorted_to = tmp_path / "out.csv", tmp_path / "sorted"
    deepclust("predict", f"run={folder}", f"images={photos}", f"output={output}", f"sort_to={sorted_to}")
    for file in (folder / "assignments.csv", output):
        lines = file.read_bytes().splitlines()[1:]
        assert [line.rpartition(b",")[2].rpartition(b"/")[2] for line in lines] == names
    assert b"/broken\xff.png\t" in (tmp_path / "out.csv.unreadable.txt").read_bytes()
    assert sorted(os.fsencode(copy.name)[7:] for copy in sorted_to.rglob("*.png")) == names
    assert len(read_clusters(folder)) == 40
    assert re.search(r"\d\d\?\.png", (folder / "report.html").read_text())


def test_predict_refuses_what_it_cannot_use(tmp_path, run_small, monkeypatch, capfd):
    _, folder = run_small("trainer.max_epochs=1")
    asked = [f"images={tmp_path}", f"output={tmp_path}/out.csv"]
    checkpoint = load_checkpoint(folder)  # as it is saved before the end
    torch.save({k: v for k, v in checkpoint.items() if k != "cluster_means" and "kmeans" not in k}, folder / CHECKPOINT)
    assert "is not a finished run" in refused(monkeypatch, capfd, "predict", f"run={folder}", *asked)
    np.save(tmp_path / "train_features.npy", np.random.default_rng(0).normal(size=(60, 5)).astype("f4"))
    vectors = ["dataset=features", f"dataset.path={tmp_path}", "dataset.num_clusters=3", "report.map_points=0"]
    run(compose_train(*vectors, "method=kmeans", "hardware=cpu", "batch_size=20"), tmp_path)
    assert "clusters vectors of 5 numbers" in refused(monkeypatch, capfd, "predict", f"run={tmp_path}", *asked)
    assert not list(tmp_path.glob("out.csv*"))


def test_evaluate_warns_where_an_image_is_gone(tmp_path, run_small):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (40, 16, 16), np.uint8)):
        Image.fromarray(pixels).save(photos / f"{number}.png")
    given = ["dataset=folder", f"dataset.path={photos}", f"data_dir={tmp_path}/data", "dataset.num_clusters=3"]
    _, folder = run_small(*given, "dataset.image_size=16", "batch_size=20", "trainer.max_epochs=1")
    assert "the run had" not in deepclust("evaluate", f"run={folder}").stderr
    (photos / "7.png").unlink()
    done = deepclust("evaluate", f"run={folder}")
    assert "the run had 40 images and there are 39 now" in done.stderr
    assert json.loads(done.stdout)["run"] == str(folder)


def test_evaluate_of_no_run(tmp_path, monkeypatch, capfd):
    assert "last.ckpt" in refused(monkeypatch, capfd, "evaluate", f"run={tmp_path}")
