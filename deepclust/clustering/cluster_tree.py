"""A tree of clusters: nested partitions of all images, from fine to coarse, and how they join flat clusters.

Its levels are the partitions (R, M) after each of R rounds, numbered from 1. At level 0 every image is a cluster of its
own. Clusters are numbered by their first members.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepclust.clustering.merge_order import Merge

Labels = NDArray[np.integer]
MAX_MERGES = 100  # in results.json; the first ones


def count_clusters(partitions: Labels) -> NDArray[np.int64]:
    """Return the number of clusters (R + 1,) at each level of partitions (R, M)."""
    return np.array([partitions.shape[1], *(int(labels.max()) + 1 for labels in partitions)])


def partition_at(partitions: Labels, level: int) -> Labels:
    """Return the partition (M,) at a level of partitions (R, M)."""
    return partitions[level - 1] if level else np.arange(partitions.shape[1], dtype=partitions.dtype)


@dataclass(frozen=True)
class ClusterTree:
    """A tree of M images, and the flat clusters that were cut out of it."""

    partitions: NDArray[np.int32]  # (R, M): the cluster of each image after each round
    thresholds: NDArray[np.float64]  # (R,): the lowest average similarity at which clusters were joined in the round
    modularities: NDArray[np.float64]  # (R + 1,): of each level, on the graph of neighbours
    assignments: NDArray[np.int64]  # (M,): the flat clusters, from 0, none of which is empty

    @property
    def counts(self) -> NDArray[np.int64]:
        """The number of clusters (R + 1,) at each level."""
        return count_clusters(self.partitions)

    def summarize(self) -> dict[str, Any]:
        """Return what results.json says of it: of each level, from 0 on, and of the merges of the flat clusters."""
        return {
            "num_clusters": self.counts.tolist(),
            "thresholds": [None, *(float(t) if math.isfinite(t) else None for t in self.thresholds)],
            "modularities": self.modularities.tolist(),
            "merges": [asdict(merge) for merge in self.list_merges()[:MAX_MERGES]],
        }

    def list_merges(self) -> list[Merge]:
        """Return how the flat clusters join on the way to the root, the first ones first.

        The distance of a merge is its round; what no round has joined meets in round R + 1. A round joins flat clusters
        that have images in one of its clusters.
        """
        num_clusters, num_rounds = int(self.assignments.max()) + 1, len(self.partitions)
        groups, merges = [[cluster] for cluster in range(num_clusters)], []
        for number, (labels, count) in enumerate(zip(self.partitions, self.counts[1:], strict=True), 1):
            if count < len(groups):
                groups, found = _join_groups(groups, _find_parts(self.assignments, labels), number)
                merges += found
        return merges + _join_groups(groups, np.zeros(num_clusters, dtype=int), num_rounds + 1)[1]


def _find_parts(assignments: Labels, labels: Labels) -> Labels:
    """Return the part (K,) of each flat cluster: clusters are in one part if a chain of shared labels connects them."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    num_clusters, num_labels = int(assignments.max()) + 1, int(labels.max()) + 1
    codes = np.unique(assignments.astype(np.int64) * num_labels + labels)
    shape = num_clusters, num_labels
    shares = csr_array((np.ones(len(codes)), (codes // num_labels, codes % num_labels)), shape=shape)
    return connected_components(shares @ shares.T, directed=False)[1]


def _join_groups(groups: list[list[int]], parts: Labels, number: int) -> tuple[list[list[int]], list[Merge]]:
    """Return the groups of clusters after those in one of `parts` (K,) are joined, and the merges, two at a time."""
    joined: dict[int, list[int]] = {}
    merges = []
    for group in groups:
        part = int(parts[group[0]])
        if part in joined:
            merges.append(Merge(joined[part], group, float(number)))
        joined[part] = joined.get(part, []) + group
    return list(joined.values()), merges
