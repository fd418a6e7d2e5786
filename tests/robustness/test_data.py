"""Data outside what is usual: values, labels, channels, sizes and batches are taken as they are meant, or refused."""

import csv
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from PIL import Image
from sklearn.datasets import load_digits

from deepclust.commands.predict import main as predict
from deepclust.commands.train import run
from deepclust.errors import InputError
from deepclust.runs.checkpoint import load_checkpoint
from tests.conftest import compose_train
from tests.test_configurations import list_options

pytestmark = pytest.mark.sampled

DIGITS = np.rint(load_digits().images[:120] * (255 / 16)).astype(np.uint8)
LABELS = load_digits().target[:120]
# The same pictures as uint8 would hold, kept as other numbers.
SAME_PICTURES = {
    "float 0 to 255": DIGITS.astype(np.float32),
    "float 0 to 4080": DIGITS.astype(np.float32) * 16,
    "float 0 to 1": (DIGITS / 255).astype(np.float32),
    "float -1 to 1": (DIGITS / 127.5 - 1).astype(np.float32),
    "int32 0 to 255": DIGITS.astype(np.int32),
    "int32 in thousands": DIGITS.astype(np.int32) * 1000,
    "12 of 16 bits": DIGITS.astype(np.uint16) * 16,
    "16 bits": DIGITS.astype(np.uint16) * 257,
}
SMALL = [
    *("method=kmeans", "backbone=identity", "views=digits", "hardware=cpu", "batch_size=32"),
    *("report.map_points=0", "report.per_cluster=2", "evaluation.kmeans_restarts=2"),
]
FOLDER = ["dataset=folder", "dataset.num_clusters=10", "dataset.image_size=8", "dataset.channels=1"]
FOLDER += ["dataset.mean=[0.5]", "dataset.std=[0.25]"]
ARRAYS = ["dataset=arrays", "dataset.num_clusters=10"]


def write_folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:03d}.tif")
    return folder


def write_array(file: Path, images: np.ndarray) -> Path:
    np.save(file, images)
    return file


def train(folder: Path, *overrides: str) -> Path:
    folder.mkdir()
    run(compose_train(*SMALL, f"data_dir={folder}/data", *overrides), folder)
    return folder


def read_assignments(file: Path) -> list[tuple[str, str]]:
    with file.open() as lines:
        return [(row["cluster"], row["confidence"]) for row in csv.DictReader(lines)]


def predict_assignments(trained: Path, images: Path) -> list[tuple[str, str]]:
    output = trained / f"{images.name}.csv"
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        overrides = [f"run={trained}", f"images={images}", f"output={output}", "accelerator=cpu"]
        predict(compose("predict", overrides=overrides))
    return read_assignments(output)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """The run on the pictures as uint8."""
    folder = tmp_path_factory.mktemp("reference")
    return train(folder / "run", *ARRAYS, f"dataset.path={write_array(folder / 'a.npy', DIGITS)}")


@pytest.mark.parametrize("kind", SAME_PICTURES)
@pytest.mark.parametrize("container", ["folder", "array"])
def test_the_same_pictures_give_the_same_clusters_whatever_their_numbers(reference, tmp_path, caplog, container, kind):
    caplog.set_level(logging.INFO)
    images, few = SAME_PICTURES[kind], slice(10, 30)  # one set is trained on, a part of it is predicted
    if container == "folder":
        trained = train(tmp_path / "run", *FOLDER, f"dataset.path={write_folder(tmp_path / 'all', images)}")
        new = write_folder(tmp_path / "new", images[few])
    else:
        trained = train(tmp_path / "run", *ARRAYS, f"dataset.path={write_array(tmp_path / 'all.npy', images)}")
        new = write_array(tmp_path / "new.npy", images[few])
    expected = read_assignments(reference / "assignments.csv")
    assert read_assignments(trained / "assignments.csv") == expected
    assert sum("scaled to 0 to 255" in message for message in caplog.messages) == 1
    assert predict_assignments(trained, new) == predict_assignments(
        reference, write_array(tmp_path / "u8.npy", DIGITS[few])
    )
    dark = images[10:11] if images.min() < 0 else images[10:11] // 4 if images.dtype.kind != "f" else images[10:11] / 4
    alone = write_folder(tmp_path / "dark", dark) if container == "folder" else write_array(tmp_path / "dark.npy", dark)
    both = np.concatenate([dark, images[:1]])
    pair = write_folder(tmp_path / "pair", both) if container == "folder" else write_array(tmp_path / "pair.npy", both)
    assert predict_assignments(trained, alone) == predict_assignments(trained, pair)[:1], (
        "by the run's scale, not its own"
    )


@pytest.mark.parametrize("dataset", ["imagenet10", "imagenet"])  # decoded once, and each time they are read
def test_class_folders_keep_their_range_with_the_run(tmp_path, dataset):
    images, classes = (
        SAME_PICTURES["12 of 16 bits"],
        list(compose_train("dataset=imagenet10").dataset.source.make.classes),
    )
    (tmp_path / "all/train").mkdir(parents=True)
    for label, name in enumerate(classes):
        write_folder(tmp_path / "all/train" / name, images[label == LABELS])
    shape = ["dataset.image_size=8", "dataset.channels=1", "dataset.mean=[0.5]", "dataset.std=[0.25]"]
    shape += ["dataset.keep=central_squares", "dataset.stored_size=8"]
    if dataset == "imagenet":
        shape += ["dataset.num_classes=10", "dataset.source.evaluate=null"]
    trained = train(tmp_path / "run", f"dataset={dataset}", f"dataset.root={tmp_path}/all", *shape)
    with (trained / "assignments.csv").open() as lines:
        assert [int(row["label"]) for row in csv.DictReader(lines)] == sorted(LABELS)
    assert load_checkpoint(trained)["config"]["dataset"]["value_ranges"] == {"integer": [0, 4080]}
    few = slice(10, 30)
    bright = write_array(tmp_path / "bright.npy", images[few])
    dark = write_array(tmp_path / "dark.npy", images[few] // 4)
    as_8_bits = [
        write_array(tmp_path / f"{name}.npy", np.rint(values * (255 / 4080)).astype(np.uint8))
        for name, values in {"b8": images[few], "d8": images[few] // 4}.items()
    ]
    assert predict_assignments(trained, bright) == predict_assignments(trained, as_8_bits[0])
    assert predict_assignments(trained, dark) == predict_assignments(trained, as_8_bits[1]), "by the run's range"


@pytest.mark.parametrize("container", ["folder", "array"])
def test_new_images_outside_the_range_are_named(tmp_path, caplog, container):
    images = SAME_PICTURES["12 of 16 bits"]
    if container == "folder":
        trained = train(tmp_path / "run", *FOLDER, f"dataset.path={write_folder(tmp_path / 'all', images)}")
        new = write_folder(tmp_path / "new", np.stack([images[0], images[1] * 10]))
    else:
        trained = train(tmp_path / "run", *ARRAYS, f"dataset.path={write_array(tmp_path / 'all.npy', images)}")
        new = write_array(tmp_path / "new.npy", np.stack([images[0], images[1] * 10]))
    predict_assignments(trained, new)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "1 of 2" in warning and "integers from 0 to 4080" in warning and "clipped" in warning
    assert ("001.tif" if container == "folder" else "images 1") in warning


def test_a_range_that_is_set_is_used_and_a_wrong_one_is_refused(tmp_path):
    path = f"dataset.path={write_folder(tmp_path / 'all', SAME_PICTURES['12 of 16 bits'])}"
    trained = train(tmp_path / "run", *FOLDER, path, "dataset.value_ranges={integer: [0, 4095]}")
    stored = next((tmp_path / "run" / "data").glob("folder-*/train_images.npy"))
    assert np.load(stored).max() == 254 and (trained / "results.json").is_file()
    with pytest.raises(InputError, match=r"value_ranges"):
        train(tmp_path / "wrong", *FOLDER, path, "dataset.value_ranges={integer: [9, 3]}")


@pytest.mark.parametrize("container", ["folder", "array"])
@pytest.mark.parametrize("run_channels", [1, 3])
@pytest.mark.parametrize("new_channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 2])
def test_new_images_are_brought_to_the_channels_and_the_size_of_the_run(
    tmp_path, container, run_channels, new_channels, scale
):
    colour = np.stack([DIGITS, DIGITS.transpose(0, 2, 1), 255 - DIGITS], axis=-1)
    images = {1: DIGITS, 3: colour}
    trained = train(tmp_path / "run", *ARRAYS, f"dataset.path={write_array(tmp_path / 'a.npy', images[run_channels])}")
    new = np.kron(images[new_channels][:4], np.ones((1, scale, scale, 1)[: images[new_channels].ndim], np.uint8))
    as_folder = predict_assignments(trained, write_folder(tmp_path / "new", new))
    as_array = predict_assignments(trained, write_array(tmp_path / "new.npy", new))
    assert as_folder == as_array and len(as_array) == 4


LABEL_CASES = {
    "class numbers": LABELS,
    "from 1": LABELS + 1,
    "ids": LABELS * 10_000_000,
    "one very large": np.where(LABELS == 9, 10**9, LABELS),
    "unsigned": LABELS.astype(np.uint64) + np.uint64(2**63),
    "some unknown": np.where(np.arange(120) % 5 == 0, -1, LABELS * 7),
}


@pytest.mark.parametrize("kind", LABEL_CASES)
def test_labels_of_any_integers_are_classes(reference, tmp_path, kind):
    np.savez(tmp_path / "a.npz", images=DIGITS, labels=LABEL_CASES[kind])
    folder = tmp_path / "run"
    folder.mkdir()
    results = run(compose_train(*SMALL, "dataset=arrays", f"dataset.path={tmp_path}/a.npz"), folder)
    assert results["num_classes"] == results["num_clusters"] == 10 and results["scores"]["method"]["acc"] > 0.5
    assert read_assignments(folder / "assignments.csv") == read_assignments(reference / "assignments.csv")


@pytest.mark.parametrize("method", list_options("method"))
def test_a_batch_of_one_image_trains_or_is_refused_in_one_line(tmp_path, method):
    np.savez(tmp_path / "a.npz", images=np.repeat(DIGITS[:16, ..., None], 3, axis=3))
    cfg = compose_train(
        *(f"method={method}", "dataset=arrays", f"dataset.path={tmp_path}/a.npz", "dataset.num_clusters=4"),
        *("backbone=conv_small", "hardware=cpu", "report.map_points=0"),
    )
    stage = cfg
    while stage is not None:
        stage.batch_size, stage.trainer.max_epochs = 1, min(1, stage.trainer.max_epochs or 1)
        stage = stage.get("before")
    (tmp_path / "run").mkdir()
    try:
        run(cfg, tmp_path / "run")
    except InputError as error:
        assert "batch_size is 1, and the network normalises over batches; expected 2 images" in str(error)
        assert "batch_size=2 or more" in str(error) and "\n" not in str(error)
        assert not list((tmp_path / "run").rglob("*.ckpt"))
        return
    assert os.path.exists(tmp_path / "run" / "results.json")


def test_images_of_one_pixel_are_refused_in_one_line(tmp_path):
    path = write_array(tmp_path / "a.npy", DIGITS[:, :1, :1])
    with pytest.raises(InputError, match="holds images of 1 x 1 x 1; expected images of more than one pixel"):
        train(tmp_path / "run", *ARRAYS, f"dataset.path={path}")


def test_image_files_of_one_pixel_are_enlarged(tmp_path):
    path = write_folder(tmp_path / "all", DIGITS[:, 3:4, 3:4])
    trained = train(tmp_path / "run", *FOLDER, f"dataset.path={path}")
    assert len(read_assignments(trained / "assignments.csv")) == 120
