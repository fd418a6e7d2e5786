"""Files of whole images in their own shapes: what does not fit together is refused before it is read."""

from pathlib import Path

import numpy as np
import pytest

from deepclust.datasets.array_files import open_stored_images
from deepclust.datasets.image_sources import WholeImageSource
from deepclust.datasets.named_datasets import load_arrays
from deepclust.datasets.one_time_conversion import write_whole_images
from deepclust.errors import InputError

SHAPES = [(4, 6), (6, 4), (5, 5), (9, 4)]


def write_splits(folder: Path, channels: int = 3) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for split, count in (("train", 4), ("test", 3)):
        images[split] = [rng.integers(0, 256, (*shape, channels), dtype=np.uint8) for shape in SHAPES[:count]]
        chunks = [images[split][:2], [], images[split][2:]]
        assert write_whole_images(folder, split, chunks, channels=channels, expected_area=99, total=9) == count
        np.save(folder / f"{split}_labels.npy", np.arange(count) % 2)
    return images


ARGUMENTS = {"fit": ["train", "test"], "evaluate": None, "extra": [], "channels": 3, "num_classes": 2, "make": None}


def test_splits_are_joined_in_order(tmp_path: Path):
    images = write_splits(tmp_path)
    data = load_arrays(folder=str(tmp_path), **ARGUMENTS)
    assert isinstance(data.fit, WholeImageSource) and data.fit.shape == (None, None, 3) and data.evaluation is data.fit
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1, 0] and isinstance(data.fit.pixels[1], np.memmap)
    order = np.array([6, 0, 3, 3, 4])
    joined = [*images["train"], *images["test"]]
    for picture, index in zip(data.fit.read(order).take_apart(), order, strict=True):
        assert np.array_equal(picture, joined[index])
    assert min(SHAPES[data.fit.smallest()]) == 4
    split = load_arrays(folder=str(tmp_path), **{**ARGUMENTS, "fit": ["train"], "evaluate": ["test"]})
    assert (len(split.fit), len(split.evaluation), len(split.labels)) == (4, 3, 3)


def test_grey_images_are_read_with_three_channels_but_not_the_reverse(tmp_path: Path):
    images = write_splits(tmp_path / "grey", channels=1)
    grey = open_stored_images(tmp_path / "grey", ["train"], channels=3).read(np.arange(4))
    assert np.array_equal(grey.take_apart()[3], np.repeat(images["train"][3], 3, 2))
    write_splits(tmp_path / "colour")
    with pytest.raises(InputError, match=r"dataset\.channels=3"):
        open_stored_images(tmp_path / "colour", ["train"], channels=1)


@pytest.mark.parametrize("index", [-1, 4])
def test_positions_beyond_the_ends_are_refused(tmp_path: Path, index):
    write_splits(tmp_path)
    with pytest.raises(IndexError):
        open_stored_images(tmp_path, ["train"], channels=3).read(np.array([0, index]))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "train_images",
            np.zeros((100, 3), np.uint8),
            "holds uint8 .*; expected .* 109 pixels as train_shapes.npy says",
        ),
        ("train_images", np.zeros((4, 5, 5, 3), np.uint8), "both files"),
        ("train_images", np.zeros((109, 3), np.float32), "holds float32"),
        ("train_shapes", np.zeros((4, 2), int), "height and width of each image"),
        ("train_shapes", np.ones((4, 3), int), "height and width of each image"),
        ("train_shapes", np.full((4, 2), 2.5), "height and width of each image"),
        ("test_shapes", None, "test_shapes.npy is missing"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, name, array, message):
    write_splits(tmp_path)
    (tmp_path / f"{name}.npy").unlink()
    if array is not None:
        np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(InputError, match=message):
        load_arrays(folder=str(tmp_path), **ARGUMENTS)


def test_a_file_that_is_cut_short_while_it_is_read_is_named(tmp_path: Path):
    write_splits(tmp_path)
    source = open_stored_images(tmp_path, ["train"], channels=3)
    with (tmp_path / "train_images.npy").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(InputError, match=r"train_images\.npy was cut short"):
        source.read(np.array([0]))
