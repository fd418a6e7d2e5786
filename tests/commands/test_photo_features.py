"""`deepclust cluster` on many photos: decoded as they are read, gone on from where a start was killed, bounded."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from PIL import Image
from sklearn.datasets import load_digits

from deepclust.backbones.resnet import ResNet
from deepclust.commands import photo_features, time_forecast
from deepclust.commands.cluster import cluster
from deepclust.commands.time_forecast import foretell_time
from deepclust.datasets.features import load_features
from deepclust.errors import InputError

BATCH_SIZE = 16
# Blocks as short as can be, so that half of these few photos are on the disk before all are.
RUN_WITH_SHORT_BLOCKS = """
from deepclust.commands import photo_features
from deepclust.cli.main import main
photo_features.SECONDS_PER_BLOCK = 0.0
raise SystemExit(main())
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """120 digits as JPEG and PNG files, and two broken ones among them."""
    root = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(load_digits().images[:120]):
        image = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((40 + i % 13, 44)).convert("RGB")
        image.save(root / f"{i:03d}.{'jpg' if i % 2 else 'png'}")
    for name in ("010 broken.jpg", "100 broken.png"):
        (root / name).write_bytes(b"\xff\xd8 no more")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(ResNet(depth=18, stem="imagenet", in_channels=3).network.state_dict(), file)
    return file


def call(folder: Path, photos: Path, weights: Path, *overrides: str) -> dict:
    folder.mkdir(exist_ok=True, parents=True)
    short = ["hardware=cpu", "min_steps=9", "max_steps=9", "num_seeds=1", "report.map_points=0", "rule=kmeans"]
    small = ["backbone=resnet18", f"backbone.weights={weights}", "dataset.image_size=32", f"batch_size={BATCH_SIZE}"]
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        cfg = compose("cluster", overrides=[*short, *small, "num_clusters=5", "images=x", *overrides])
        cfg.images = str(photos)
        return cluster(cfg, folder)


def read_features(folder: Path) -> np.ndarray:
    return np.load(folder / "features" / "train_features.npy")


def read_clusters(folder: Path) -> list[list[str]]:
    with (folder / "assignments.csv").open(newline="") as file:
        return [[row["path"], row["cluster"]] for row in csv.DictReader(file)]


def test_a_start_that_was_killed_goes_on_and_no_decoded_copy_is_kept(photos, weights, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    kept = call(tmp_path / "kept", photos, weights, "keep_images=true")  # decodes all, then computes
    assert list((tmp_path / "kept" / "data").glob("*/train_images.npy"))

    monkeypatch.setattr(photo_features, "SECONDS_PER_BLOCK", 0.0)
    encoded: list[int] = []

    def prepare(*given):
        encode = prepare_encoder(*given)

        def encode_until_killed(pixels):
            encoded.append(len(pixels))
            if len(encoded) == 5:
                raise KeyboardInterrupt
            return encode(pixels)

        return encode_until_killed

    prepare_encoder = photo_features.prepare_encoder
    monkeypatch.setattr(photo_features, "prepare_encoder", prepare)
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        call(folder, photos, weights)
    with (folder / "features" / "train_thumbnails.bin").open("ab") as file:
        file.write(b"half of a block")
    with pytest.raises(InputError):  # half of a data set is none
        load_features(path=str(folder / "features"), num_classes=None)
    results = call(folder, photos, weights)
    assert "going on from 65 of 122 files" in caplog.text  # four batches of 16, and a broken file
    assert encoded == [16] * 5 + [16, 16, 16, 8]
    np.testing.assert_array_equal(read_features(folder), read_features(tmp_path / "kept"))
    assert read_clusters(folder) == read_clusters(tmp_path / "kept")
    broken = [[10, str(photos / "010 broken.jpg")], [101, str(photos / "100 broken.png")]]
    assert [item[:2] for item in results["unreadable"]] == broken
    assert results["unreadable"] == kept["unreadable"] and results["trust"] == kept["trust"]
    assert not (folder / "data").exists() and not (folder / "features" / "blocks.json").exists()
    # The folder is a data set with pictures, and what is complete is not made again.
    pictures = load_features(path=str(folder / "features"), num_classes=None).pictures
    assert pictures is not None and len(pictures) == 120 and pictures.shape == (96, 96, 3)
    made = (folder / "features" / "train_features.npy").stat().st_mtime_ns
    assert call(folder, photos, weights, "num_clusters=4")["num_clusters"] == 4 and len(encoded) == 9
    assert (folder / "features" / "train_features.npy").stat().st_mtime_ns == made


@pytest.mark.slow
def test_a_command_that_is_killed_twice_goes_on_to_the_same_files(photos, weights, tmp_path):
    """SIGKILL in the middle of the features, and again when the first of the trainings on them is complete."""
    options = ["hardware=cpu", "backbone=resnet18", f"backbone.weights={weights}", "dataset.image_size=32"]
    options += [f"images={photos}", "num_clusters=5", "batch_size=4", "min_steps=60", "max_steps=60", "num_seeds=2"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"

    def start(folder: Path, *, is_time_to_kill: Callable[[], bool] = lambda: False) -> int:
        command = [sys.executable, "-c", RUN_WITH_SHORT_BLOCKS, "cluster", *options, f"hydra.run.dir={folder}"]
        with subprocess.Popen([*command, "report.map_points=0"], env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
            while process.poll() is None and not is_time_to_kill():
                time.sleep(0.005)
            process.kill()
        return process.returncode

    def count_done() -> int:
        journal = killed / "features" / "blocks.json"
        return json.loads(journal.read_text())["state"]["num_files"] if journal.exists() else 0

    assert start(undisturbed) == 0
    assert start(killed, is_time_to_kill=lambda: count_done() >= 50) == -signal.SIGKILL
    assert not (killed / "features" / "made_by.json").exists()
    assert start(killed, is_time_to_kill=lambda: any(killed.glob("clusters/*/results.json"))) == -signal.SIGKILL
    assert not (killed / "assignments.csv").exists()
    assert start(killed) == 0
    assert (killed / "cluster.log").read_text().count("going on from") == 1
    for name in ("assignments.csv", "features/train_features.npy"):
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes()


def test_files_that_have_changed_are_not_gone_on_from(photos, weights, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(photo_features, "SECONDS_PER_BLOCK", 0.0)
    some = tmp_path / "some"
    some.mkdir()
    for file in sorted(photos.glob("0*.png")):
        (some / file.name).write_bytes(file.read_bytes())
    folder = tmp_path / "run"
    call(folder, some, weights)
    clusters = read_clusters(folder)
    (some / "000.png").write_bytes((some / "002.png").read_bytes())
    call(folder, some, weights)
    features = read_features(folder)
    np.testing.assert_array_equal(features[0], features[1])
    assert "going on from" not in caplog.text and len(clusters) == len(features)


def test_of_many_images_a_sample_is_trained_on_and_all_have_clusters(photos, weights, tmp_path):
    folder = tmp_path / "run"
    results = call(folder, photos, weights, "max_fitted=60", "rule=lnscc", "thumbnail_size=48")
    assert results["num_images"] == 120 and len(read_clusters(folder)) == 120
    (run,) = folder.glob("clusters/lnscc-*")
    assert json.loads((run / "results.json").read_text())["num_images"] == 60
    picture = "data:image/jpeg"  # in the report of the whole alone: those of each clustering would take as much again
    assert picture in (folder / "report.html").read_text() and picture not in (run / "report.html").read_text()
    pictures = load_features(path=str(folder / "features"), num_classes=None).pictures
    assert pictures is not None and pictures.shape == (48, 48, 3)


def foretell(features: torch.Tensor, number: str, *, seconds_per_image: float, num_images: int) -> str:
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        cfg = compose("cluster", overrides=["images=x", f"num_clusters={number}"])
        return foretell_time(cfg, features, seconds_per_image=seconds_per_image, num_images=num_images)


def test_the_time_is_foretold_without_drawing_from_the_generator():
    features, before = torch.rand(8, 64), torch.random.get_rng_state()
    text = foretell(features, "5", seconds_per_image=0.36, num_images=100_000)
    assert "features 10.0 h" in text and "clusters" in text and "report" in text
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("5", "features 60 s, clusters 38 s, report 12 s"),
        ("[5,10,20]", "features 60 s, clusters 63 s, report 36 s"),
        ("auto", "clusters 38 s, report 12 s; 25 s more for each further number that auto names"),
    ],
)
def test_the_time_of_each_number_of_clusters_is_counted(number, text, monkeypatch):
    # A step and a block of 128 times 4,096 products take 4 ms. Per seed, two thirds of 3,000 steps and a graph make
    # the embedding; the others and one more graph make the clusters of each number.
    monkeypatch.setattr(time_forecast, "measure", lambda call: 0.004)
    assert foretell(torch.rand(8, 64), number, seconds_per_image=0.01, num_images=6000).endswith(text)
