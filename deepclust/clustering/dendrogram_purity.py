"""Dendrogram purity: how well a tree of clusters keeps the points of each class together, exactly and for all pairs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def dendrogram_purity(partitions: NDArray[np.integer], classes: NDArray[np.integer]) -> float | None:
    """Return the dendrogram purity in [0, 1] of a tree of nested partitions (R, M) below one root.

    For two points of one class, it is the share of that class among the points below the lowest node that holds both;
    the purity is the mean over all such pairs. Pairs are counted where they meet, so that nothing is sampled, in a time
    of O(R M) at most. Points of class -1 are left out. None if no two points are of one class.
    """
    # Rows of a table: of how many points of a class a node holds, beginning with the points themselves; of each such
    # group of points the position of one is kept.
    members = np.flatnonzero(classes >= 0)
    counts: NDArray[Any] = np.ones(len(members))
    num_classes = int(classes.max(initial=-1)) + 1
    num_pairs = count_pairs(np.bincount(classes[members]).astype(float)).sum()
    if num_pairs == 0:
        return None
    total = 0.0
    for labels in (*partitions, np.zeros_like(classes)):
        codes = labels[members].astype(np.int64) * num_classes + classes[members]
        codes, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        merged = np.bincount(inverse, counts)
        new_pairs = count_pairs(merged) - np.bincount(inverse, count_pairs(counts))
        sizes = np.bincount(codes // num_classes, merged)
        total += float((new_pairs * merged / sizes[codes // num_classes]).sum())
        members, counts = members[first], merged
    return total / float(num_pairs)


def count_pairs(counts: NDArray[Any]) -> NDArray[Any]:
    """Return how many pairs so many points have."""
    return counts * (counts - 1) / 2
