"""Clustering by sub-cluster components: a tree of clusters, built in rounds from a graph of neighbours.

This is the algorithm of SCC (Monath et al., KDD 2021). In a round every cluster links to the neighbour with which it is
most similar on average, if they are similar enough; what is linked, directly or in a chain, becomes one cluster. The
threshold falls from round to round. Of equal neighbours the one of the lowest number wins, and nothing is random, so
that the same graph always gives the same tree. Clusters are numbered by their first members.

Sums are in float64. Similarities in float32 add up there without rounding errors, so that equal averages are equal in
any order of summation.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from deepclust.clustering.cluster_tree import Labels
from deepclust.clustering.neighbor_graph import NeighborGraph

MARGIN = 1e-6  # by which the last threshold lies below the smallest average there can be, as a share of it


def choose_threshold_range(graph: NeighborGraph) -> tuple[float, float]:
    """Return the highest and the lowest threshold of a graph: with them every connected component ends as one cluster.

    The average similarity of two clusters counts pairs without an edge as 0. One edge among M points is at least
    4 / M^2 of all pairs, so no average is below 4 / M^2 of the smallest weight. Both are 1 without edges.
    """
    if len(graph.weights) == 0:
        return 1.0, 1.0
    smallest_average = 4 * float(graph.weights.min()) / graph.num_rows**2
    return max(1.0, float(graph.weights.max())), smallest_average * (1 - MARGIN)


def agglomerate(graph: NeighborGraph, thresholds: NDArray[np.float64], *, only_mutual: bool) -> NDArray[np.int32]:
    """Return the partitions (R, M) of the points of a graph after each round; each is coarser than the one before.

    One of the falling `thresholds` holds in a round, and the rounds end early when no edge between clusters is left;
    R is 0 if there is none at the start. With thresholds of minus infinity it is affinity clustering. `only_mutual`
    joins only clusters that link to each other.
    """
    size = graph.num_rows
    sums = graph.to_sparse()
    sizes: NDArray[Any] = np.ones(size)
    labels, partitions = np.arange(size, dtype=np.int32), []
    best, similarities = find_most_similar(sums, sizes)
    for threshold in thresholds:
        if sums.nnz == 0:
            break
        linked = np.flatnonzero((best >= 0) & (similarities >= threshold))
        if len(linked):
            links = csr_array((np.ones(len(linked)), (linked, best[linked])), shape=sums.shape)
            _, components = connected_components(links, connection="strong" if only_mutual else "weak")
            parents = number_by_first_member(components)
            labels = parents[labels]
            sums, sizes = contract(sums, parents), np.bincount(parents, sizes)
            best, similarities = find_most_similar(sums, sizes)
        partitions.append(labels)
    return np.array(partitions, dtype=np.int32).reshape(len(partitions), size)


def find_most_similar(sums: csr_array, sizes: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the most similar neighbour (C,) of each cluster and their average similarity (C,); -1 and -inf for none.

    `sums` (C, C) are the sums of the similarities of all edges between two clusters, and `sizes` (C,) their points.
    """
    rows = list_rows(sums)
    averages = sums.data / (sizes[rows] * sizes[sums.indices])
    has_edge = np.diff(sums.indptr) > 0
    largest, best = np.full(len(sizes), -np.inf), np.full(len(sizes), -1)
    if len(averages):
        largest[has_edge] = np.maximum.reduceat(averages, sums.indptr[:-1][has_edge])
    positions = np.flatnonzero(averages == largest[rows])
    rows_of_positions, first = np.unique(rows[positions], return_index=True)
    best[rows_of_positions] = sums.indices[positions[first]]
    return best, largest


def contract(sums: csr_array, parents: Labels) -> csr_array:
    """Return the sums between new clusters, of the sums between old ones; `parents` (C,) are the new of the old."""
    first, second = parents[list_rows(sums)], parents[sums.indices]
    is_between = first != second
    size = int(parents.max()) + 1
    contracted = csr_array((sums.data[is_between], (first[is_between], second[is_between])), shape=(size, size))
    contracted.sum_duplicates()
    return contracted


def list_rows(sums: csr_array) -> NDArray[np.int32]:
    """Return the row of each stored entry."""
    return np.repeat(np.arange(sums.shape[0], dtype=np.int32), np.diff(sums.indptr))


def number_by_first_member(labels: Labels) -> NDArray[np.int32]:
    """Return labels (M,) numbered from 0 in the order in which they first occur."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    ranks = np.empty(len(first), dtype=np.int32)
    ranks[first.argsort()] = np.arange(len(first))
    return ranks[inverse]
