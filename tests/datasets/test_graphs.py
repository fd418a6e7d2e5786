"""Attributed graphs in a file: read as they are given, and refused by name where something is wrong."""

import zipfile

import numpy as np
import pytest

from deepclust.datasets import mapped_arrays
from deepclust.datasets.graphs import load_graph
from deepclust.errors import InputError

GRAPH = {
    "edges": np.array([[0, 1], [1, 2]], np.int32),
    "self_loops": np.array([2], np.int32),
    "feature_shape": np.array([4, 3]),
    "feature_rows": np.array([0, 1, 2], np.int32),
    "feature_cols": np.array([2, 0, 0], np.int32),
    "labels": np.array([0, 0, 1, 1]),
}


def save(folder, **changes):
    arrays = {name: array for name, array in (GRAPH | changes).items() if array is not None}
    np.savez(folder / "graph.npz", **arrays)
    return str(folder / "graph.npz")


def test_a_graph_of_binary_features(tmp_path):
    images = load_graph(path=save(tmp_path), num_classes=None)
    vectors = images.fit.read(np.arange(4)).flatten(1)
    assert vectors.tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert images.fit is images.evaluation and images.name == "graph"
    np.testing.assert_array_equal(images.fit.edges, GRAPH["edges"])
    np.testing.assert_array_equal(images.labels, GRAPH["labels"])


def test_a_graph_of_other_features_without_labels(tmp_path):
    features = np.array([[0.5, 1], [2, 3], [4, 5]])
    images = load_graph(path=save(tmp_path, features=features, labels=None), num_classes=None)
    assert images.fit.read(np.arange(3)).flatten(1).tolist() == features.tolist() and images.labels is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": None}, "no array edges"),
        ({"edges": np.array([[0.5], [1.0]])}, "edges in it are float64"),
        ({"edges": np.array([0, 1])}, r"edges has the shape \(2,\)"),
        ({"edges": np.array([[0], [4]])}, "edges in it go from 0 to 4"),
        ({"edges": np.array([[0], [-1]])}, "edges in it go from -1 to 0"),
        ({"feature_cols": np.array([0, 1, 3])}, "feature_cols in it go from 0 to 3"),
        ({"feature_rows": np.array([0])}, r"feature_rows has the shape \(1,\)"),
        ({"feature_shape": np.array([10**9, 10**9])}, "feature_shape"),
        ({"features": np.array([[np.nan], [1.0]])}, "NaN"),
        ({"labels": np.array([0, 1])}, r"labels \(2,\)"),
        ({"edges": np.array([[None], [1]])}, "cannot be read"),
    ],
)
def test_what_is_no_graph_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_graph(path=save(tmp_path, **changes), num_classes=None)


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a file"):
        load_graph(path=str(tmp_path / "none.npz"), num_classes=None)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no graph")
    with pytest.raises(InputError, match="cannot be read"):
        load_graph(path=str(tmp_path / "broken.npz"), num_classes=None)


def test_members_that_are_no_arrays_are_not_read(tmp_path):
    path = save(tmp_path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("features", "text")
    assert len(load_graph(path=path, num_classes=None).fit) == 4
    np.savez(tmp_path / "none.npz", features=np.eye(2))
    with zipfile.ZipFile(tmp_path / "none.npz", "a") as file:
        file.writestr("edges", "text")
    with pytest.raises(InputError, match="no array edges"):
        load_graph(path=str(tmp_path / "none.npz"), num_classes=None)


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_arrays, "MAX_UNPACKED_BYTES", 2**16)
    np.savez_compressed(tmp_path / "bomb.npz", edges=np.zeros((2, 2**16), np.int64), features=np.eye(2))
    with pytest.raises(InputError, match="unpacks from"):
        load_graph(path=str(tmp_path / "bomb.npz"), num_classes=None)
