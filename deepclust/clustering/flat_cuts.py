"""Flat clusters out of a tree of nested partitions: near a number of clusters, exactly that number, or the best number.

A tree is its partitions (R, M) after each of R rounds, as `agglomerate` returns them; level 0 counts too.
"""

import heapq

import numpy as np
from numpy.typing import NDArray

from deepclust.clustering.cluster_tree import Labels, count_clusters, partition_at
from deepclust.clustering.merge_order import sum_unit_rows
from deepclust.clustering.neighbor_graph import NeighborGraph
from deepclust.clustering.subcluster_components import contract, list_rows, number_by_first_member

DIGITS = 12  # of cosines and modularities; what differs by less is equal
BLOCK_ROWS = 1024  # of a matrix of cosines that is in memory at a time


def nearest_cut(partitions: Labels, num_clusters: int) -> Labels:
    """Return the partition (M,) whose number of clusters is nearest; of equally near ones the finer."""
    return partition_at(partitions, int(np.abs(count_clusters(partitions) - num_clusters).argmin()))


def exact_cut(partitions: Labels, num_clusters: int, graph: NeighborGraph, features: NDArray[np.floating]) -> Labels:
    """Return a partition (M,) into exactly `num_clusters` clusters, or into M if there are fewer points.

    The coarsest partition with at least as many clusters is taken. In it, the two clusters with the highest average
    similarity in `graph` are joined again and again. Where no edge is left, the two whose mean directions have the
    largest cosine are joined; the directions are those of `features` (M, D). Of equal pairs the first one is joined.
    """
    counts = count_clusters(partitions)
    level = int(np.flatnonzero(counts >= min(num_clusters, counts[0]))[-1])
    labels: Labels = number_by_first_member(partition_at(partitions, level))
    labels = _join_by_edges(labels, num_clusters, graph)
    return _join_by_directions(labels, num_clusters, features)


def _join_by_edges(labels: Labels, num_clusters: int, graph: NeighborGraph) -> Labels:
    """Join pairs of clusters, the highest average similarity first, until so many are left or no edge is."""
    sizes = np.bincount(labels).astype(float).tolist()
    num_left = len(sizes)
    if num_left <= num_clusters:
        return labels
    sums = contract(graph.to_sparse(), labels)
    between: list[dict[int, float]] = [{} for _ in sizes]
    for a, b, total in zip(list_rows(sums).tolist(), sums.indices.tolist(), sums.data.tolist(), strict=True):
        between[a][b] = total
    # An entry is out of date once its average is no longer that of the pair; then the pair has a newer one.
    # The first of the heap is the pair to join, since its averages have a minus sign.
    pairs = ((a, b, total) for a, row in enumerate(between) for b, total in row.items() if a < b)
    heap = [(-total / (sizes[a] * sizes[b]), a, b) for a, b, total in pairs]
    heapq.heapify(heap)
    parents = np.arange(num_left)
    while heap and num_left > num_clusters:
        negative_average, a, b = heapq.heappop(heap)
        if negative_average >= 0:
            break
        if b not in between[a] or negative_average != -between[a][b] / (sizes[a] * sizes[b]):
            continue
        for c, total in between[b].items():
            del between[c][b]
            if c != a:
                between[a][c] = between[c][a] = between[a].get(c, 0.0) + total
        between[b].clear()
        parents[b] = a
        sizes[a] += sizes[b]
        num_left -= 1
        for c, total in between[a].items():
            heapq.heappush(heap, (-total / (sizes[a] * sizes[c]), min(a, c), max(a, c)))
    return number_by_first_member(_follow(parents)[labels])


def _join_by_directions(labels: Labels, num_clusters: int, features: NDArray[np.floating]) -> Labels:
    """Join pairs of clusters, the largest cosine of their mean directions first, until so many are left."""
    num_left = size = int(labels.max()) + 1
    if num_left <= num_clusters:
        return labels
    totals = sum_unit_rows(features, labels, size)
    directions, is_left, parents = scale_to_unit(totals), np.ones(size, dtype=bool), np.arange(size)
    largest, partners = np.full(size, -np.inf), np.zeros(size, dtype=np.int64)  # among the clusters behind each

    def find_partners(clusters: NDArray[np.int64]) -> None:
        for block in np.split(clusters, range(BLOCK_ROWS, len(clusters), BLOCK_ROWS)):
            cosines = (directions[block] @ directions.T).round(DIGITS)
            cosines[~is_left | (np.arange(size) <= block[:, None])] = -np.inf
            partners[block] = cosines.argmax(1)
            largest[block] = cosines.max(1)

    find_partners(np.arange(size))
    while num_left > max(num_clusters, 1):
        a = int(largest.argmax())
        b = int(partners[a])
        totals[a] += totals[b]
        directions[a] = scale_to_unit(totals[a])
        is_left[b], largest[b], parents[b] = False, -np.inf, a
        num_left -= 1
        before = np.flatnonzero(is_left[:a])
        cosines = (directions[before] @ directions[a]).round(DIGITS)
        is_nearer = (cosines > largest[before]) | ((cosines == largest[before]) & (a < partners[before]))
        is_stale = is_left & ((partners == a) | (partners == b))
        largest[before[is_nearer]], partners[before[is_nearer]] = cosines[is_nearer], a
        is_stale[before[is_nearer]] = False
        is_stale[a] = True
        find_partners(np.flatnonzero(is_stale))
    return number_by_first_member(_follow(parents)[labels])


def _follow(parents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the last ancestor of each cluster, where `parents` (C,) names a cluster itself if it has no other."""
    while not np.array_equal(parents, grandparents := parents[parents]):
        parents = grandparents
    return parents


def scale_to_unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return vectors (..., D) scaled to length 1; those of zeros stay as they are."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def compute_modularities(partitions: Labels, graph: NeighborGraph) -> NDArray[np.float64]:
    """Return the modularity (R + 1,) of each level of a tree on a graph: how much of the weight lies inside clusters.

    The share of the weight inside clusters, less what it would be on average if edges joined their ends at random: the
    sum of the squared shares of the degrees. 0 without edges.
    """
    edges = graph.to_sparse()
    first, degrees = list_rows(edges), edges.sum(1)
    counts, modularities = count_clusters(partitions), np.zeros(len(partitions) + 1)
    if edges.nnz == 0:
        return modularities
    for level in range(len(modularities)):
        if level and counts[level] == counts[level - 1]:
            modularities[level] = modularities[level - 1]
            continue
        labels = partition_at(partitions, level)
        inside = edges.data[labels[first] == labels[edges.indices]].sum()
        shares = np.bincount(labels, degrees) / degrees.sum()
        modularities[level] = inside / degrees.sum() - np.square(shares).sum()
    return modularities


def best_level(modularities: NDArray[np.float64]) -> int:
    """Return the level with the largest modularity; of equal ones the finest."""
    return int(modularities.round(DIGITS).argmax())
