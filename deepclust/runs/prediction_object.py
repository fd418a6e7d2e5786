"""The clusters of new images, as `predict` of a run returns them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepclust.errors import InputError


@dataclass(frozen=True, eq=False)
class Prediction:
    """The clusters of M new images or vectors, in their order; it acts as the array of labels.

    Attributes:
        labels_: (M,) int64, the clusters, counted from 0; -1 for images that cannot be read.
        confidence: (M,) float64 in [0, 1], of the clusters; 0 for images that cannot be read.
        distance: (M,) float64, of the features to the mean of the training images in the cluster; nan for images that
            cannot be read, and for a cluster that held no training image.
        skipped: (path, reason) of the images that cannot be read.
        paths: the M image files; None for arrays.
        names: what clusters are called, by their numbers; empty where the run names none.

    Example:
        >>> import numpy
        >>> found = Prediction(numpy.array([0, 2]), numpy.array([0.9, 0.6]), numpy.array([1.5, 4.0]))
        >>> len(found), int(found[1]), numpy.asarray(found).tolist()
        (2, 2, [0, 2])
    """

    labels_: NDArray[np.int64]
    confidence: NDArray[np.float64]
    distance: NDArray[np.float64]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    paths: list[str] | None = None
    names: dict[int, str] = field(default_factory=dict)

    def to_frame(self) -> Any:
        """Return a pandas DataFrame: cluster, confidence, distance and, where they are known, path and name.

        `name` is what the run calls the cluster, and empty for clusters without a name.

        Raises:
            InputError: if pandas is not installed.
        """
        columns: dict[str, Any] = {"cluster": self.labels_, "confidence": self.confidence, "distance": self.distance}
        if self.paths is not None:
            columns["path"] = self.paths
        if self.names:
            columns["name"] = [self.names.get(cluster, "") for cluster in self.labels_.tolist()]
        return make_frame(columns)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.labels_, dtype=dtype) if copy else np.asarray(self.labels_, dtype=dtype)

    def __len__(self) -> int:
        return len(self.labels_)

    def __getitem__(self, index: Any) -> Any:
        return self.labels_[index]

    def __iter__(self) -> Iterator[np.int64]:
        return iter(self.labels_)


def make_frame(columns: dict[str, Any]) -> Any:
    """Return a pandas DataFrame with these columns.

    Raises:
        InputError: if pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError:
        raise InputError("pandas is not installed", expected="it for to_frame()", do="pip install pandas") from None
    return pandas.DataFrame(columns)


def place_rows(values: NDArray[Any], rows: NDArray[Any], num_rows: int, fill: Any, dtype: Any) -> NDArray[Any]:
    """Return an array of `num_rows` with `values` at these rows, and `fill` at all others."""
    placed = np.full((num_rows, *values.shape[1:]), fill, dtype)
    placed[rows] = values
    return placed


def no_readable_image_error(skipped: list[tuple[str, str]]) -> InputError:
    """Return the error for images of which none can be read, by the path and the reason of each."""
    return InputError(
        f"none of the {len(skipped)} images can be read (the first: {skipped[0][0]}: {skipped[0][1]})",
        expected="images",
        do="give others",
    )
