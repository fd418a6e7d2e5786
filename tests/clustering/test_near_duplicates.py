"""Near-duplicates: planted ones are found, in one piece and in cells, and nothing else is."""

import numpy as np
import pytest

from deepclust.clustering import near_duplicates
from deepclust.clustering.near_duplicates import (
    find_close_pairs,
    find_near_duplicates,
    group_around_first,
    join_groups,
)


def make_features(count: int, *, seed: int = 0) -> np.ndarray:
    """Return features (count, 32) in four groups, like those of a network: none are negative."""
    rng = np.random.default_rng(seed)
    centres = rng.gamma(0.5, 1, (4, 32))
    return np.maximum(0, centres[np.arange(count) % 4] + rng.normal(0, 0.5, (count, 32))).astype(np.float32)


@pytest.mark.parametrize("max_exact_rows", [5000, 100])
def test_planted_near_duplicates_are_found_and_nothing_else(
    max_exact_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_EXACT_ROWS", max_exact_rows)
    features = make_features(600)
    features[500:550] = 3 * (features[:50] + 0.02)  # lengths do not count
    features[550] = features[500]
    features[590] = features[580]
    groups = find_near_duplicates(features, seed=0)
    assert groups == [[0, 500, 550], *([row, 500 + row] for row in range(1, 50)), [580, 590]]
    assert find_near_duplicates(features, seed=0) == groups


@pytest.mark.parametrize(("max_distance", "expected"), [(0.105, [[0, 1]]), (0.095, [])])
def test_the_distance_of_a_pair_is_that_of_unit_rows(max_distance: float, expected: list[list[int]]) -> None:
    angles = np.array([0, 0.1, 1.5])  # 2 sin(0.05), about 0.1, between the first two
    features = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32) * [[1], [5], [2]]
    pairs = find_close_pairs(features, np.arange(3), np.full(3, max_distance, np.float32), seed=0)
    assert pairs.tolist() == expected


def test_rows_that_are_all_the_same_are_one_group_and_few_have_no_surroundings() -> None:
    assert find_near_duplicates(np.ones((50, 4), np.float32), seed=0) == [list(range(50))]
    assert find_near_duplicates(np.zeros((50, 4), np.float32), seed=0) == [list(range(50))]
    assert find_near_duplicates(np.ones((20, 4), np.float32), seed=0) == [list(range(20))]
    assert find_near_duplicates(np.ones((19, 4), np.float32), seed=0) == []


def test_many_copies_of_one_row_are_one_group() -> None:
    features = make_features(200)
    features[100:180] = features[7]
    assert find_near_duplicates(features, seed=0) == [[7, *range(100, 180)]]


def test_a_chain_of_small_steps_is_no_group() -> None:
    assert group_around_first(np.array([[0, 1], [1, 2], [2, 3]])) == [[0, 1], [2, 3]]
    assert group_around_first(np.empty((0, 2), np.int64)) == []


def test_groups_that_share_a_member_are_joined() -> None:
    assert join_groups([[4, 5], [1, 2]], [[2, 9], [7, 8]]) == [[1, 2, 9], [4, 5], [7, 8]]
    assert join_groups([], []) == []
