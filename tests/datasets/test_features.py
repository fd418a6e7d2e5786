"""Data sets of vectors: what is loaded, and what is refused."""

import numpy as np
import pytest
import torch

from deepclust.datasets.features import load_features
from deepclust.errors import InputError


def write_array(folder, name, array):
    folder.mkdir(exist_ok=True)
    np.save(folder / name, array)


def test_vectors_without_labels(tmp_path):
    table = np.random.default_rng(0).normal(size=(30, 7)).astype(np.float32)
    write_array(tmp_path, "train_features.npy", table)
    images = load_features(path=str(tmp_path), num_classes=None)
    assert images.labels is None and images.pictures is None and images.evaluation is images.fit
    assert images.name == tmp_path.name
    read = images.fit.read(np.array([4, 0, 29]))
    assert read.shape == (3, 7, 1, 1) and images.fit.shape == (1, 1, 7)
    assert torch.equal(read.flatten(1), torch.from_numpy(table[[4, 0, 29]]))


def test_the_split_test_is_evaluated_if_it_exists(tmp_path):
    write_array(tmp_path, "train_features.npy", np.zeros((5, 3), np.float32))
    write_array(tmp_path, "test_features.npy", np.ones((4, 3), np.float32))
    write_array(tmp_path, "test_labels.npy", np.arange(4) % 2)
    images = load_features(path=str(tmp_path), num_classes=None)
    assert len(images.fit) == 5 and len(images.evaluation) == 4 and images.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [(None, "holds no train_features"), (np.zeros((3, 2)), "float64"), (np.zeros((3, 2, 1), np.float32), "3, 2, 1")],
)
def test_refuses_files_that_are_not_vectors(tmp_path, rows, message):
    if rows is not None:
        write_array(tmp_path, "train_features.npy", rows)
    with pytest.raises(InputError, match=message):
        load_features(path=str(tmp_path), num_classes=None)


def test_refuses_splits_with_vectors_of_different_lengths(tmp_path):
    write_array(tmp_path, "train_features.npy", np.zeros((3, 2), np.float32))
    write_array(tmp_path, "test_features.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(InputError, match="2 numbers"):
        load_features(path=str(tmp_path), num_classes=None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train_images.npy",
            np.zeros((4, 2, 2, 1), np.uint8),
            "train_images.npy holds 4 images; expected 5, one for each vector",
        ),
        ("train_paths.json", '["a", "b"', "train_paths.json holds no list of files"),
        ("train_paths.json", "[1, 2, 3, 4, 5]", "train_paths.json holds no list of files"),
        ("train_paths.json", '["a", "b"]', "train_paths.json names 2 files"),
    ],
)
def test_refuses_files_that_do_not_fit_the_vectors(tmp_path, name, content, message):
    write_array(tmp_path, "train_features.npy", np.zeros((5, 3), np.float32))
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    else:
        write_array(tmp_path, name, content)
    with pytest.raises(InputError, match=message):
        load_features(path=str(tmp_path), num_classes=None)


@pytest.mark.parametrize("split", ["train", "test"])
def test_refuses_rows_that_are_not_finite(tmp_path, split):
    rows = np.zeros((7, 3), np.float32)
    write_array(tmp_path, "train_features.npy", rows)
    rows[4, 1], rows[6, 0] = np.nan, -np.inf
    write_array(tmp_path, f"{split}_features.npy", rows)
    with pytest.raises(InputError, match=rf"{split}_features.npy holds NaN or infinity in 2 of 7 rows \(4, 6\)"):
        load_features(path=str(tmp_path), num_classes=None)
