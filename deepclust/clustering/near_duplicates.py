"""Near-duplicates: images whose features are far closer to each other than features of two images usually are."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from deepclust.clustering.unit_rows import BLOCK_ROWS, draw_rows, to_unit_rows

# Distance of near-duplicates, in units of the distance to the NEIGHBOR_RANK-th nearest of some rows drawn at random: of
# what lies around an image, but for its own duplicates. docs/photos.md says how the number was found.
MAX_RELATIVE_DISTANCE = 0.5
NEIGHBOR_RANK = 10
NUM_DRAWN = 500
MIN_DISTANCE = 1e-3  # below it, rounding decides; equal rows are found as such
MIN_ROWS = 20  # with fewer, there is nothing around an image
MAX_EXACT_ROWS = 5000  # up to which all pairs are looked at; of more rows, those in cells that are near
NEAR_CELLS = 3  # of a row, in which its near-duplicates are looked for
MAX_PARTNERS = 16  # of a row that are kept in a cell, the nearest ones


def find_near_duplicates(features: NDArray[np.float32], *, seed: int) -> list[list[int]]:
    """Return groups of near-duplicates among rows (M, D): positions in order, at least two in a group.

    A group is a row and those near it that are in no earlier group, so that no chain of small steps joins what is far
    apart, and the rows that are equal to these. The lengths of the rows do not count. More than MAX_EXACT_ROWS rows are
    divided into cells around rows drawn at random, and near-duplicates are looked for in the cells nearest to a row, so
    that the time grows with M to the power of 1.5. A pair in cells that are not near each other is not found then.
    """
    if len(features) < MIN_ROWS:
        return []
    hashes = [hash(row.tobytes()) for row in features]
    _, unique_rows, groups_of_rows = np.unique(hashes, return_index=True, return_inverse=True)
    firsts = unique_rows[groups_of_rows]
    repeated = np.flatnonzero(firsts != np.arange(len(firsts)))
    equal = [[first, row] for first, row in zip(firsts[repeated].tolist(), repeated.tolist(), strict=True)]
    rows = np.sort(unique_rows)
    with threadpool_limits(limits=1):  # several threads add up in varying order
        max_distances = MAX_RELATIVE_DISTANCE * measure_spacing(features, rows, seed=seed)
        pairs = find_close_pairs(features, rows, max_distances, seed=seed)
    return join_groups(group_around_first(pairs), equal)


def measure_spacing(features: NDArray[np.float32], rows: NDArray[np.int64], *, seed: int) -> NDArray[np.float32]:
    """Return how far the NEIGHBOR_RANK-th nearest of up to NUM_DRAWN rows is from each row of `features`: (M,).

    Distances are those of rows scaled to length 1; the rows are drawn among `rows`.
    """
    drawn = to_unit_rows(features[rows[draw_rows(len(rows), NUM_DRAWN, seed, "spacing")]])
    rank = min(NEIGHBOR_RANK, len(drawn) - 1)
    blocks = (features[start : start + BLOCK_ROWS] for start in range(0, len(features), BLOCK_ROWS))
    cosines = [np.partition(to_unit_rows(block) @ drawn.T, -1 - rank, axis=1)[:, -1 - rank] for block in blocks]
    return np.sqrt(np.maximum(0, 2 - 2 * np.concatenate(cosines)))


def find_close_pairs(
    features: NDArray[np.float32], rows: NDArray[np.int64], max_distances: NDArray[np.float32], *, seed: int
) -> NDArray[np.int64]:
    """Return the pairs (P, 2) of `rows`, positions in `features` (M, D), that are close to each other.

    Both allow the distance by `max_distances` (M,). Distances are those of rows scaled to length 1.
    """
    rows = rows[max_distances[rows] > MIN_DISTANCE]
    if len(rows) < 2:
        return np.empty((0, 2), np.int64)
    num_cells = 1 if len(rows) <= MAX_EXACT_ROWS else math.isqrt(len(rows))
    centres = to_unit_rows(features[rows[draw_rows(len(rows), num_cells, seed, "cells")][:num_cells]])
    near = np.concatenate(
        [
            torch.from_numpy(to_unit_rows(features[block]) @ centres.T).topk(min(NEAR_CELLS, num_cells)).indices.numpy()
            for block in np.split(rows, range(BLOCK_ROWS, len(rows), BLOCK_ROWS))
        ]
    )
    min_cosines = 1 - max_distances**2 / 2
    found = []
    for cell in range(num_cells):
        keys, queries = rows[near[:, 0] == cell], rows[(near == cell).any(1)]
        unit_keys = to_unit_rows(features[keys])
        for block in np.split(queries, range(BLOCK_ROWS, len(queries), BLOCK_ROWS)):
            cosines = to_unit_rows(features[block]) @ unit_keys.T
            cosines[block[:, None] == keys] = -1  # a row is no partner of its own
            if cosines.shape[1] > MAX_PARTNERS:
                least = np.partition(cosines, -MAX_PARTNERS, axis=1)[:, -MAX_PARTNERS, None]
                cosines[cosines < least] = -1
            first, second = np.nonzero(cosines >= min_cosines[block][:, None])
            is_mutual = cosines[first, second] >= min_cosines[keys[second]]
            pairs = np.stack([block[first[is_mutual]], keys[second[is_mutual]]], 1)
            found.append(np.sort(pairs, axis=1))
    return np.unique(np.concatenate(found), axis=0)


def group_around_first(pairs: NDArray[np.int64]) -> list[list[int]]:
    """Return groups: of each row that is in none yet, in order, itself and those paired with it that are in none."""
    partners: dict[int, list[int]] = {}
    for first, second in pairs.tolist():
        partners.setdefault(first, []).append(second)
    taken: set[int] = set()
    groups = []
    for first in sorted(partners):
        others = sorted(set(partners[first]) - taken)
        if first not in taken and others:
            groups.append([first, *others])
            taken.update(groups[-1])
    return groups


def join_groups(*groupings: list[list[int]]) -> list[list[int]]:
    """Return the groups of all groupings, where groups that share a member are one; in order of their first members."""
    leaders: dict[int, int] = {}

    def find_leader(row: int) -> int:
        while leaders.setdefault(row, row) != row:
            row = leaders[row]
        return row

    for group in (group for grouping in groupings for group in grouping):
        for row in group[1:]:
            first, second = sorted((find_leader(group[0]), find_leader(row)))
            leaders[second] = first
    joined: dict[int, list[int]] = {}
    for row in sorted(leaders):
        joined.setdefault(find_leader(row), []).append(row)
    return list(joined.values())
