"""Sets of whole images in their own shapes, from training to prediction: every part that reads images takes them."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from PIL import Image
from sklearn.datasets import load_digits

from deepclust.batch import PaddedImages
from deepclust.commands import evaluate, export_program, features, predict
from deepclust.commands.train import run
from deepclust.config.build import build
from deepclust.datasets.features import load_features
from deepclust.datasets.image_sources import FileSource, WholeImageSource, count_bytes, keep_on_device
from deepclust.errors import InputError
from deepclust.runs.assemble import build_datamodule
from tests.conftest import SMALL_RUN, compose_train
from tests.processes import PROGRAM
from tests.runs.test_resume import assert_same_outcome
from tests.views.conftest import assert_close

SHAPES = [(24, 32), (32, 24), (24, 24), (26, 61)]  # 4:3, 3:4, a square and a panorama, in pixels
NUM_IMAGES = 80


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder train/SYNSET/*.jpg of the ten classes of ImageNet-10, with digits as their images."""
    root = tmp_path_factory.mktemp("originals")
    synsets = list(compose_train("dataset=imagenet10").dataset.source.make.classes)
    digits = load_digits()
    for number in range(NUM_IMAGES):
        height, width = SHAPES[number % len(SHAPES)]
        digit = Image.fromarray((digits.images[number] * 15).astype(np.uint8)).resize((22, 22))
        picture = Image.new("RGB", (width, height), (40, 60, 20))
        picture.paste(digit, (width - 23, height - 23))
        folder = root / "train" / synsets[int(digits.target[number])]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number:03}.jpg", quality=95)
    return root


def list_settings(root: Path, data_dir: Path, *overrides: str) -> list[str]:
    return [
        *SMALL_RUN,
        "dataset=imagenet10",
        "backbone=conv_small",
        f"dataset.root={root}",
        f"data_dir={data_dir}",
        "dataset.image_size=16",
        "dataset.stored_size=20",
        "batch_size=40",
        "clean_batch_size=32",
        *overrides,
    ]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def trained(root, data_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    results = run(compose_train(*list_settings(root, data_dir, "views=propos_blur")), folder)
    assert results["num_images"] == NUM_IMAGES and results["scores"]["kmeans"] is not None
    return folder


def call(command, name: str, *overrides: str):
    """Run a command, given as its module and the name of its configuration."""
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        return command.main(compose(name, overrides=[*overrides]))


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


def test_whole_images_are_stored_with_their_proportions(root, data_dir, trained):
    folder = data_dir / "imagenet10-whole_images-20"
    shapes = np.load(folder / "train_shapes.npy")
    assert len(shapes) == NUM_IMAGES and set(map(tuple, shapes.tolist())) == {(20, 26), (26, 20), (20, 20), (20, 46)}
    assert np.load(folder / "train_images.npy", mmap_mode="r").shape == (shapes.prod(1).sum(), 3)
    images = build(compose_train(*list_settings(root, data_dir)).dataset.source)
    assert isinstance(images.fit, WholeImageSource) and isinstance(images.fit.pixels[0], np.memmap)


def test_the_report_shows_whole_images(trained):
    page = (trained / "report.html").read_text()
    shown = {tuple(map(int, pair)) for pair in re.findall(r'width="(\d+)" height="(\d+)" alt', page)}
    assert {(26, 20), (20, 26), (46, 20)} <= shown


def test_a_run_that_was_killed_goes_on_bit_for_bit(root, data_dir, trained, tmp_path):
    overrides = list_settings(root, data_dir, "views=propos_blur", "callbacks.checkpoint.every_n_steps=1")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "train", *overrides, f"hydra.run.dir={tmp_path}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "checkpoints/last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "results.json").exists()
    run(compose_train(*overrides), tmp_path)
    assert_same_outcome(trained, tmp_path)


def test_evaluation_comes_to_the_scores_of_the_run(trained):
    scores = call(evaluate, "evaluate", f"run={trained}", "accelerator=cpu")["scores"]
    assert scores == json.loads((trained / "results.json").read_text())["scores"]


def test_predictions_of_the_files_are_the_assignments_of_the_run(root, trained, tmp_path):
    """They are read in batches of other sizes, and thus padded otherwise than in training."""
    arguments = [f"run={trained}", "accelerator=cpu", "batch_size=7", f"images={root}"]
    call(predict, "predict", *arguments, f"output={tmp_path}/all.csv")
    clusters = {row["path"]: row for row in read_rows(tmp_path / "all.csv")}
    assigned = {row["path"]: row for row in read_rows(trained / "assignments.csv") if row.get("path")}
    assert len(clusters) == NUM_IMAGES
    for path, row in assigned.items():
        assert row["cluster"] == clusters[path]["cluster"]
    one = next(iter(root.rglob("003.jpg")))  # the panorama
    call(predict, "predict", f"run={trained}", "accelerator=cpu", f"images={one}", f"output={tmp_path}/one.csv")
    (row,) = read_rows(tmp_path / "one.csv")
    assert row["cluster"] == clusters[str(one)]["cluster"]
    assert float(row["confidence"]) == pytest.approx(float(clusters[str(one)]["confidence"]), abs=1e-5)
    array = np.asarray(Image.open(one))[None]
    np.save(tmp_path / "one.npy", array)
    array_file = f"images={tmp_path}/one.npy"
    call(predict, "predict", f"run={trained}", "accelerator=cpu", array_file, f"output={tmp_path}/array.csv")
    (row_of_array,) = read_rows(tmp_path / "array.csv")
    assert float(row_of_array["confidence"]) == pytest.approx(float(row["confidence"]), abs=0.02)  # of a large JPEG


def test_features_of_a_run_are_kept_with_whole_pictures(root, data_dir, trained, tmp_path):
    folder = call(features, "features", f"run={trained}", "accelerator=cpu", f"output={tmp_path}", "batch_size=9")
    kept = load_features(path=str(folder), num_classes=10)
    images = build(compose_train(*list_settings(root, data_dir)).dataset.source)
    assert isinstance(kept.pictures, WholeImageSource) and len(kept.fit) == NUM_IMAGES
    pictures, originals = (source.read(np.arange(9)).take_apart() for source in (kept.pictures, images.fit))
    assert all(np.array_equal(a, b) for a, b in zip(pictures, originals, strict=True))
    again = run(compose_train("dataset=features", f"dataset.path={folder}", "method=kmeans", "hardware=cpu"), tmp_path)
    assert again["scores"]["method"] is not None and (tmp_path / "report.html").is_file()


def test_an_exported_program_says_how_to_bring_whole_images_to_its_size(root, data_dir, tmp_path):
    for views, words in (("propos_blur", "keep the central part"), ("propos", "resize the whole image")):
        cfg = compose_train(*list_settings(root, data_dir, f"views={views}"))
        program = SimpleNamespace(clean=build(cfg.multi_view).pipelines["clean"])
        assert words in export_program.explain_other_sizes(cfg, program)


# The parts ------------------------------------------------------------------------------------------------------------


class MethodWithNeighbours:
    """Asks for the next two images as companions of each image."""

    weight_dtype = torch.float32

    def companions(self, indices, draws):
        return torch.stack([indices + 1, indices + 2], 1) % NUM_IMAGES


@pytest.fixture
def datamodule(root, data_dir):
    cfg = compose_train(*list_settings(root, data_dir, "views=propos_blur", "view_names=[weak,weak]"))
    datamodule = build_datamodule(cfg, build(cfg.dataset.source))
    datamodule.trainer = SimpleNamespace(lightning_module=MethodWithNeighbours())
    return datamodule


def test_the_shares_of_processes_are_those_of_one_process(datamodule, monkeypatch):
    indices = datamodule.draw_epoch_batches(0, None)[0]
    whole = datamodule.on_after_batch_transfer(datamodule.read_batch(indices, 0, 0), 0)
    assert [view.shape for view in whole.companion_views] == [(40, 3, 16, 16)] * 2
    shares = []
    for rank in range(3):
        monkeypatch.setattr("deepclust.engine.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("deepclust.engine.distributed.world_size", lambda: 3)
        shares.append(datamodule.on_after_batch_transfer(datamodule.read_batch(indices, 0, 0), 0))
    for number, view in enumerate(whole.views):
        assert_close(torch.cat([share.views[number] for share in shares]), view, 1e-5)
    # The views of companions are drawn anew for each position, so that they hang on no process either.
    for number, view in enumerate(whole.companion_views):
        assert_close(torch.cat([share.companion_views[number] for share in shares]), view, 1e-5)


def test_resident_images_are_those_of_the_source(datamodule):
    source = datamodule.fit
    resident = keep_on_device(source, torch.device("cpu"))
    indices = np.array([3, 0, 79, 3, 41])
    read, expected = resident.read(indices), source.read(indices)
    assert torch.equal(read.pixels, expected.pixels) and torch.equal(read.shapes, expected.shapes)
    assert len(resident) == NUM_IMAGES and count_bytes(source) == resident.pixels.numel()


def test_files_that_are_decoded_when_read_are_whole_too(root, tmp_path):
    synset = sorted(path.name for path in (root / "train").iterdir())[0]
    classes = ["dataset=imagenet", f"dataset.root={root}", f"data_dir={tmp_path}", "dataset.source.evaluate=null"]
    classes += ["dataset.num_classes=10", "dataset.stored_size=20"]
    source = build(compose_train(*classes).dataset.source).fit
    images = source.read(np.arange(8))
    assert isinstance(source, FileSource) and isinstance(images, PaddedImages) and synset in source.paths[0].decode()
    assert images.shapes.amin(1).tolist() == [20] * 8 and count_bytes(source) == float("inf")
    original = build(compose_train(*classes, "dataset.stored_size=original").dataset.source).fit.read(np.arange(80))
    assert {tuple(shape) for shape in original.shapes.tolist()} == set(SHAPES)
    squares = build(compose_train(*classes, "dataset.keep=central_squares").dataset.source).fit.read(np.arange(3))
    assert squares.shape == (3, 3, 20, 20)
    with pytest.raises(InputError, match=r"dataset\.keep=whole_images"):
        build(compose_train(*classes, "dataset.keep=central_squares", "dataset.stored_size=original").dataset.source)


def test_a_folder_keeps_squares_or_whole_images_apart(root, tmp_path):
    settings = ["dataset=folder", f"dataset.path={root}", f"data_dir={tmp_path}", "dataset.num_clusters=3"]
    squares = build(compose_train(*settings, "dataset.image_size=16").dataset.source).fit
    whole = build(compose_train(*settings, "dataset.stored_size=20", "dataset.keep=whole_images").dataset.source).fit
    assert squares.shape == (16, 16, 3) and len(whole) == NUM_IMAGES
    assert {tuple(shape) for shape in whole.shapes.tolist()} == {(20, 26), (26, 20), (20, 20), (20, 46)}


def test_views_that_leave_shapes_different_are_refused_before_training(root, data_dir):
    cfg = compose_train(*list_settings(root, data_dir, "views=digits"))
    cfg.multi_view.pipelines.weak = cfg.multi_view.pipelines.weak[1:]
    with pytest.raises(InputError, match=r"comes to Affine while .* dataset\.keep=central_squares"):
        build_datamodule(cfg, build(cfg.dataset.source))


EXPERIMENTS = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "conf/experiment").glob("*imagenet*.yaml")
    if "tiny" not in path.stem and "override /dataset: features" not in path.read_text()
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_published_recipes_crop_whole_images(name):
    start = ["start=DIR"] if name.startswith("scan") else []
    cfg = compose_train(f"experiment={name}", "dataset.num_images=1000", "dataset.root=DIR", *start)
    assert cfg.dataset.keep == "whole_images" and cfg.dataset.stored_size == (
        384 if cfg.dataset.image_size == 224 and not name.startswith("scan") else 256
    )
    short, side = cfg.dataset.stored_size, cfg.dataset.image_size
    shapes = torch.tensor([[short, short * 4 // 3], [short * 4 // 3, short]])
    left_white = torch.zeros(2, 3, short, short * 4 // 3, dtype=torch.uint8)
    left_white[..., : short // 8] = 255  # of the first, the left; of the second, which lies on its side, the top
    views = build(cfg.multi_view)
    images = PaddedImages(left_white, shapes)
    made = views(images, torch.Generator(), rows=slice(0, 2), global_batch_size=2)
    assert {view.shape[-1] for view in made} <= {side, 96} and made[0].shape == (2, 3, side, side)
    clean = views.clean(images)
    border = torch.stack([clean[0, 0, side // 2, 0], clean[1, 0, 0, side // 2]])
    is_squeezed = name.startswith(("cc", "digpro"))
    is_seen = border - clean[:, 0].min() > 0.5
    assert (is_seen == is_squeezed).all(), "the ends of the long side are seen only where the whole image is squeezed"
