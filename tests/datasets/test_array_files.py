"""Array files of one's own images: what is accepted, and how the rest is refused."""

from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from deepclust.datasets.array_files import load_array_file
from deepclust.datasets.image_sources import ArraySource
from deepclust.errors import InputError

COLOUR = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
LABELS = np.array([0, 1, 2, 0, 1, -1], np.int32)


def load_images(path: Path, value_ranges: dict | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return images and labels of an array file as a data set has them."""
    data = load_array_file(path=str(path), channels=None, num_classes=None, value_ranges=value_ranges)
    return data.fit.joined.arrays[0], data.labels


@pytest.mark.parametrize("array", [COLOUR, GREY, GREY[..., None]])
def test_npy_file(tmp_path: Path, array: np.ndarray):
    np.save(tmp_path / "a.npy", array)
    images, labels = load_images(tmp_path / "a.npy")
    assert labels is None and isinstance(images, np.memmap)
    assert (images == array.reshape(*array.shape[:3], -1)).all()


def test_npz_file(tmp_path: Path):
    np.savez(tmp_path / "a.npz", images=COLOUR, labels=LABELS, other=np.zeros(3))
    images, labels = load_images(tmp_path / "a.npz")
    assert (images == COLOUR).all()
    assert labels is not None and labels.dtype == np.int64 and (labels == LABELS).all()
    np.savez_compressed(tmp_path / "b.npz", anything=GREY)
    images, labels = load_images(tmp_path / "b.npz")
    assert (images[..., 0] == GREY).all() and labels is None
    np.savez(tmp_path / "c.npz", x=GREY, labels=LABELS)
    assert load_images(tmp_path / "c.npz")[1] is not None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_from_0_to_1_are_scaled(tmp_path: Path, dtype: type):
    np.save(tmp_path / "a.npy", (COLOUR / 255).astype(dtype))
    images, _ = load_images(tmp_path / "a.npy")
    assert images.dtype == np.uint8 and (images == COLOUR).all()


@pytest.mark.parametrize(
    ("array", "ranges"),
    [
        (COLOUR.astype(np.int64), {"integer": (0, 255)}),
        (COLOUR.astype(np.float32), {"float": (0, 255)}),
        (COLOUR.astype(np.float64) * 16, {"float": (0, 4080)}),
        (COLOUR.astype(np.uint16) * 16, {"integer": (0, 4080)}),
        (COLOUR.astype(np.uint16) * 257, {"integer": (0, 65535)}),
        (COLOUR / 127.5 - 1, {"float": (-1, 1)}),
        (COLOUR.astype(np.float16) / 255, {"float": (0, 1)}),
    ],
)
def test_other_numbers_are_scaled_by_the_rule_of_files(tmp_path: Path, array: np.ndarray, ranges: dict):
    assert COLOUR.min() == 0 and COLOUR.max() == 255
    np.save(tmp_path / "a.npy", array)
    data = load_array_file(path=str(tmp_path / "a.npy"), channels=None, num_classes=None)
    assert data.value_ranges == ranges and (data.fit.joined.arrays[0] == COLOUR).all()
    new, _ = load_images(tmp_path / "a.npy", {kind: (low, 2 * high) for kind, (low, high) in ranges.items()})
    assert new.max() < 255, "given ranges are used"


def test_images_of_one_pixel_are_a_table(tmp_path: Path):
    np.save(tmp_path / "a.npy", COLOUR[:, :1, :1])
    with pytest.raises(InputError, match=r"holds images of 1 x 1 x 3; .*dataset=features"):
        load_array_file(path=str(tmp_path / "a.npy"), channels=None, num_classes=None)


def test_an_array_file_as_a_data_set(tmp_path: Path):
    np.savez(tmp_path / "a.npz", images=GREY, labels=LABELS)
    data = load_array_file(path=str(tmp_path / "a.npz"), channels=None, num_classes=None)
    assert isinstance(data.fit, ArraySource) and data.evaluation is data.fit and data.fit.shape == (5, 4, 1)
    assert data.labels is not None and data.labels.tolist() == LABELS.tolist()
    colour = load_array_file(path=str(tmp_path / "a.npz"), channels=3, num_classes=3).fit
    assert colour.read(np.arange(6)).shape == (6, 3, 5, 4)


NAN_IMAGES = np.full((2, 4, 4), np.nan)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (NAN_IMAGES, "holds float64 values that are not finite in 2 of 2 images, such as image 0"),
        (np.where(np.arange(6)[:, None, None] == 4, np.inf, GREY), "not finite in 1 of 6 images, such as image 4"),
        (COLOUR.astype(complex), "holds complex128 values; expected numbers"),
        (COLOUR.transpose(0, 3, 1, 2), r"holds an array of shape \(6, 3, 5, 4\); .*transpose\(0, 2, 3, 1\)"),
        (GREY.reshape(6, -1), r"shape \(6, 20\); expected \(images, height, width\) or"),
        (COLOUR[:0], r"shape \(0, 5, 4, 3\)"),
        (COLOUR.astype(str), "holds <U21 values|holds <U3 values"),
    ],
)
def test_arrays_that_are_not_images_are_refused(tmp_path: Path, array: np.ndarray, message: str):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=message) as caught:
        load_images(tmp_path / "a.npy")
    assert str(tmp_path / "a.npy") in str(caught.value)


def test_files_without_valid_images_are_refused(tmp_path: Path):
    def check_refused(name: str, message: str, **arguments) -> None:
        with pytest.raises(InputError, match=message):
            load_array_file(path=str(tmp_path / name), **{"channels": None, "num_classes": None, **arguments})

    check_refused("none.npz", r"none.npz is not a file; expected a .npy or .npz file of images; set dataset\.path=FILE")
    (tmp_path / "text.npy").write_text("text")
    check_refused("text.npy", "text.npy cannot be read")
    (tmp_path / "empty.npz").write_bytes(b"")
    check_refused("empty.npz", "empty.npz cannot be read")
    np.savez(tmp_path / "cut.npz", images=COLOUR)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:200])
    check_refused("cut.npz", "cut.npz cannot be read")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    check_refused("objects.npy", "objects.npy cannot be read")
    np.savez(tmp_path / "two.npz", a=COLOUR, b=COLOUR)
    check_refused("two.npz", "two.npz holds a, b; expected an array named images")
    np.savez(tmp_path / "labels.npz", labels=LABELS)
    check_refused("labels.npz", "holds no array of images")
    np.savez(tmp_path / "few.npz", images=COLOUR, labels=LABELS[:4])
    check_refused("few.npz", r"are int32 \(4,\); expected int64 \(6,\)")
    np.savez(tmp_path / "good.npz", images=COLOUR, labels=LABELS)
    check_refused("good.npz", "go from -1 to 2; expected classes from 0 to 1", num_classes=2)
    check_refused("good.npz", r"dataset\.channels=3", channels=1)


def test_configuration_of_array_files(tmp_path: Path):
    np.savez(tmp_path / "a.npz", images=GREY, labels=LABELS)
    dataset = OmegaConf.load(Path(__file__).parents[2] / "conf" / "dataset" / "arrays.yaml")
    dataset.path = str(tmp_path / "a.npz")
    data = instantiate(OmegaConf.create({"dataset": dataset}).dataset.source)
    assert data.fit.shape == (5, 4, 1)
