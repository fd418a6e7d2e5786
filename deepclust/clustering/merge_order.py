"""In which order clusters would merge if there were fewer of them: average linkage of their mean directions."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepclust.clustering.unit_rows import BLOCK_ROWS, to_unit_rows


@dataclass(frozen=True)
class Merge:
    """Two groups of clusters that become one."""

    first: list[int]  # clusters
    second: list[int]
    distance: float  # mean cosine distance of their images


def order_merges(features: NDArray[np.float32], assignments: NDArray[np.int64]) -> list[Merge]:
    """Return the merges of all clusters of rows (M, D) that have rows, the two that are most alike first.

    The distance of two clusters is the mean cosine distance of an image of the one and an image of the other, which is
    1 minus the product of their mean unit rows. That of groups is the mean over their clusters (SciPy's average
    linkage).
    """
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    clusters, positions, sizes = np.unique(assignments, return_inverse=True, return_counts=True)
    if len(clusters) < 2:
        return []
    sums = sum_unit_rows(features, positions, len(clusters))
    means = sums / sizes[:, None]
    distances = 1 - means @ means.T
    np.fill_diagonal(distances, 0)
    members = [[cluster] for cluster in clusters.tolist()]
    merges = []
    for first, second, distance, _ in linkage(squareform(distances, checks=False), "average"):
        merges.append(Merge(members[int(first)], members[int(second)], float(distance)))
        members.append([*members[int(first)], *members[int(second)]])
    return merges


def sum_unit_rows(
    features: NDArray[np.float32], assignments: NDArray[np.integer], num_clusters: int
) -> NDArray[np.float64]:
    """Return the sums (K, D) over each cluster of the rows (M, D), scaled to length 1."""
    from scipy.sparse import csr_array

    sums = np.zeros((num_clusters, features.shape[1]))
    for start in range(0, len(features), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        unit_rows = to_unit_rows(features[block])
        places = assignments[block], np.arange(len(unit_rows))
        sums += csr_array((np.ones(len(unit_rows)), places), (num_clusters, len(unit_rows))) @ unit_rows
    return sums
