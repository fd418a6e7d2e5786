"""Labels of any integers become class numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from deepclust.datasets.array_files import load_array_file
from deepclust.datasets.dataset_checks import infer_dataset_values
from deepclust.datasets.features import load_features
from deepclust.datasets.labels import number_classes
from deepclust.datasets.named_datasets import load_arrays
from deepclust.errors import InputError

FILE = Path("labels.npy")
DIGITS = np.arange(40) % 10


def number(labels: np.ndarray, *, num_classes: int | None = None, class_names: list[str] | None = None):
    return number_classes({FILE: labels}, num_classes=num_classes, class_names=class_names)


@pytest.mark.parametrize("num_classes", [None, 10])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32, np.uint64])
def test_class_numbers_stay(dtype, num_classes):
    numbered, names = number(DIGITS.astype(dtype), num_classes=num_classes)
    assert numbered.dtype == np.int64 and (numbered == DIGITS).all() and names is None


@pytest.mark.parametrize("num_classes", [None, 10])
@pytest.mark.parametrize(
    "ids",
    [
        DIGITS + 1,
        DIGITS * 10_000_000,
        DIGITS * 10**17 + 5,
        (DIGITS.astype(np.uint64) + np.uint64(2**63)),
        (DIGITS * 3).astype(np.uint8),
    ],
    ids=["from 1", "ids", "long ids", "unsigned", "gaps"],
)
def test_ids_are_numbered_in_order_and_become_names(ids, num_classes):
    numbered, names = number(ids, num_classes=num_classes)
    assert (numbered == DIGITS).all() and names == [str(int(label)) for label in ids[:10]]
    assert number(ids, class_names=list("abcdefghij"))[1] == list("abcdefghij")


def test_unknown_stays_unknown():
    labels = np.where(DIGITS == 3, -1, DIGITS * 7)
    numbered, names = number(labels)
    assert (numbered[DIGITS == 3] == -1).all() and numbered.max() == 8 and len(names) == 9
    assert number(np.full(5, -1)) == (pytest.approx(np.full(5, -1)), None)


def test_several_files_are_numbered_alike():
    labels = {Path("train.npy"): np.array([30, 10]), Path("test.npy"): np.array([20, 10, -1], np.int8)}
    numbered, names = number_classes(labels, num_classes=None, class_names=None)
    assert numbered.tolist() == [2, 0, 1, 0, -1] and names == ["10", "20", "30"]


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (DIGITS - 2, {}, r"go from -2 to 7; expected classes from 0, and -1 for unknown; correct the labels"),
        (DIGITS, {"num_classes": 9}, r"from 0 to 8, .*is 9, or 9 distinct labels.*set dataset\.num_classes=10"),
        (np.append(DIGITS, 10**9), {"num_classes": 10}, r"go from 0 to 1000000000; .*dataset\.num_classes=11"),
        (DIGITS, {"class_names": ["a", "b"]}, r"there are 2 class names.*class_names\.json"),
        (np.arange(2000) * 7, {}, "take 2000 distinct values for 2000 images"),
    ],
)
def test_what_cannot_be_classes_is_refused(labels, arguments, message):
    with pytest.raises(InputError, match=message):
        number(labels, **arguments)


def test_the_advice_works():
    numbered, names = number(np.append(DIGITS, 10**9), num_classes=11)
    assert numbered[-1] == 10 and names[-1] == "1000000000"


@pytest.mark.parametrize("kind", ["array file", "vectors", "array folder"])
def test_every_data_set_numbers_its_labels(kind, tmp_path: Path):
    images, ids = np.zeros((40, 4, 4, 1), np.uint8), DIGITS * 10_000_000
    if kind == "array file":
        np.savez(tmp_path / "a.npz", images=images, labels=ids)
        data = load_array_file(path=str(tmp_path / "a.npz"), channels=None, num_classes=None)
    elif kind == "vectors":
        np.save(tmp_path / "train_features.npy", np.zeros((40, 3), np.float32))
        np.save(tmp_path / "train_labels.npy", ids)
        data = load_features(path=str(tmp_path), num_classes=None)
    else:
        np.save(tmp_path / "train_images.npy", images)
        np.save(tmp_path / "train_labels.npy", ids)
        (tmp_path / "class_names.json").write_text(json.dumps(list("abcdefghij")))
        choice = {"fit": ["train"], "evaluate": None, "extra": [], "channels": 1, "num_classes": None, "make": None}
        data = load_arrays(folder=str(tmp_path), **choice)
    assert (data.labels == DIGITS).all()
    assert data.class_names == (list("abcdefghij") if kind == "array folder" else [str(i * 10**7) for i in range(10)])
    declared = {"name": None, "image_size": None, "num_classes": None, "channels": None}
    assert infer_dataset_values(declared, data)["num_classes"] == 10
