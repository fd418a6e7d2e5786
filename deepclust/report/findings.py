"""What `deepclust cluster` finds beside the clusters: their names, images that repeat or belong nowhere, a tree."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepclust.clustering.merge_order import Merge

MAX_MERGES = 100  # in results.json; the next ones


@dataclass(frozen=True)
class Findings:
    """What is found in M images and their clusters; what was not looked for is empty."""

    names: dict[int, str] = field(default_factory=dict)  # suggested names of clusters
    merges: list[Merge] = field(default_factory=list)  # of clusters, those that are most alike first
    # Groups of positions, at least two in each; a group of copies is the same as another group or a part of it.
    copies: list[list[int]] = field(default_factory=list)  # files with the same content
    duplicates: list[list[int]] | None = None  # copies and near-duplicates; None: not looked for
    outlier_scores: NDArray[np.float64] | None = None  # (M,) local outlier factors; None: not looked for
    outliers: NDArray[np.int64] | None = None  # positions of the images that belong nowhere, the most isolated first

    def summarize(self) -> dict[str, Any]:
        """Return what results.json says of it; numbers of images only, because assignments.csv names them."""
        summary: dict[str, Any] = {
            "names": {str(cluster): name for cluster, name in self.names.items()},
            "merges": [asdict(merge) for merge in self.merges[:MAX_MERGES]],
        }
        if self.duplicates is not None:
            counts = len(self.duplicates), sum(map(len, self.duplicates)), len(self.copies)
            summary["duplicates"] = dict(zip(("groups", "images", "groups_with_copies"), counts, strict=True))
        if self.outliers is not None:
            summary["outliers"] = len(self.outliers)
        return summary

    def list_columns(self, num_images: int) -> dict[str, list[Any]]:
        """Return the columns that assignments.csv gets: outlier, outlier_score and duplicate_group."""
        columns: dict[str, list[Any]] = {}
        if self.outlier_scores is not None and self.outliers is not None:
            is_outlier = np.isin(np.arange(num_images), self.outliers)
            columns["outlier"] = is_outlier.astype(int).tolist()
            columns["outlier_score"] = [f"{score:.3f}" for score in self.outlier_scores.tolist()]
        if self.duplicates is not None:
            group_of = {row: number for number, group in enumerate(self.duplicates) for row in group}
            columns["duplicate_group"] = [group_of.get(row, "") for row in range(num_images)]
        return columns
