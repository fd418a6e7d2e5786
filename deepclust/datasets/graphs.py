"""Attributed graphs: nodes with features in place of images, and the edges between them.

A graph is one .npz file of plain arrays:

    edges          int (2, E), the ends of each edge, in one or both directions; an edge from a node to itself is none
    feature_rows   int (F,), where the 0/1 features of the nodes are 1: the node
    feature_cols   int (F,), and the number of the feature
    feature_shape  int (2,), the numbers of nodes M and of features D
    features       float (M, D), in place of the three above
    labels         int64 (M,), for evaluation only; may be missing
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepclust.datasets.features import convert_vectors
from deepclust.datasets.image_sources import ImageSet, VectorSource
from deepclust.datasets.labels import number_classes
from deepclust.datasets.mapped_arrays import read_named_arrays
from deepclust.errors import InputError
from deepclust.number_types import PositiveInt

ARRAYS = ("edges", "feature_rows", "feature_cols", "feature_shape", "features", "labels")
MAX_FEATURE_VALUES = 2**30  # of all nodes together, written out


class GraphSource(VectorSource):
    """The features (M, D) of the nodes of a graph, read as images of one pixel; `edges` (2, E) join the nodes."""

    def __init__(self, features: NDArray[np.float32], edges: NDArray[np.int64]) -> None:
        super().__init__([features])
        self.edges = edges


def load_graph(*, path: str, num_classes: PositiveInt | None) -> ImageSet:
    """Load the graph of a file; all of its nodes are both fitted and evaluated.

    Raises:
        InputError: if the file is missing or holds something else, or if the labels are not `num_classes` classes.
    """
    file = Path(path).expanduser()
    arrays = read_arrays(file)
    features = read_node_features(arrays, file)
    edges = require_integers(arrays, "edges", file)
    if edges.ndim != 2 or len(edges) != 2:
        raise bad_array_error(file, f"its array edges has the shape {edges.shape}", "the ends of each edge (2, E)")
    check_range(edges, len(features), "edges", file)
    labels, class_names = None, None
    if "labels" in arrays:
        labels = require_integers(arrays, "labels", file)
        if labels.shape != features.shape[:1]:
            raise bad_array_error(file, f"it holds labels {labels.shape}", f"one for each of {len(features)} nodes")
        labels, class_names = number_classes({file: labels}, num_classes=num_classes, class_names=None)
    source = GraphSource(features, edges)
    return ImageSet(source, source, labels=labels, class_names=class_names, name=file.stem)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a graph.

    Raises:
        InputError: if there is no such file, or it cannot be read.
    """
    if not file.is_file():
        raise InputError(f"{file} is not a file", expected="a graph, a .npz file", do="set dataset.path=FILE")
    try:
        return read_named_arrays(file, ARRAYS)
    except InputError:
        raise
    except Exception as error:  # a broken archive can raise nearly any exception
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise bad_array_error(file, f"it cannot be read: {reason}", "plain arrays") from error


def read_node_features(arrays: dict[str, np.ndarray], file: Path) -> NDArray[np.float32]:
    """Return the features (M, D) of the nodes.

    Raises:
        InputError: if the file tells none, or not all in a form that fits.
    """
    if "features" in arrays:
        return convert_vectors(arrays["features"], f"the array features of {file}")
    shape, rows, columns = (
        require_integers(arrays, name, file) for name in ("feature_shape", "feature_rows", "feature_cols")
    )
    if shape.shape != (2,) or shape.min() < 1 or float(shape[0]) * float(shape[1]) > MAX_FEATURE_VALUES:
        raise bad_array_error(file, f"its feature_shape is {shape.tolist()}", "the numbers of nodes and of features")
    if rows.ndim != 1 or rows.shape != columns.shape:
        raise bad_array_error(
            file, f"feature_rows has the shape {rows.shape} and feature_cols {columns.shape}", "one length for both"
        )
    num_nodes, num_features = shape.tolist()
    check_range(rows, num_nodes, "feature_rows", file)
    check_range(columns, num_features, "feature_cols", file)
    features = np.zeros((num_nodes, num_features), np.float32)
    features[rows, columns] = 1
    return features


def require_integers(arrays: dict[str, np.ndarray], name: str, file: Path) -> NDArray[np.int64]:
    """Return an array of integers as int64.

    Raises:
        InputError: if the file holds none of that name.
    """
    if name not in arrays or arrays[name].dtype.kind not in "iu":
        found = f"the {name} in it are {arrays[name].dtype}" if name in arrays else f"it holds no array {name}"
        raise bad_array_error(file, found, f"integers as {name}")
    return arrays[name].astype(np.int64)


def check_range(indices: NDArray[np.int64], count: int, name: str, file: Path) -> None:
    """Check that numbers count something of which there are `count`, from 0.

    Raises:
        InputError: if not.
    """
    if indices.size and not 0 <= indices.min() <= indices.max() < count:
        found = f"the {name} in it go from {indices.min()} to {indices.max()}"
        raise bad_array_error(file, found, f"numbers from 0 to {count - 1}")


def bad_array_error(file: Path, found: str, expected: str) -> InputError:
    """Return the error for a file that is no graph as this module reads it."""
    return InputError(
        f"{file} is no graph: {found}",
        expected=expected,
        do="write it with numpy.savez(FILE, edges=edges, features=features, labels=labels)",
    )
