"""The order in which clusters would merge: distances of means are those of all pairs of images."""

import numpy as np
import pytest

from deepclust.clustering.merge_order import order_merges


def test_the_most_alike_clusters_merge_first() -> None:
    rng = np.random.default_rng(0)
    directions = np.eye(5)[[0, 0, 1, 3]] + np.eye(5)[[4, 4, 4, 2]] * [[0.0], [0.5], [2], [0]]
    assignments = np.repeat([0, 2, 5, 7], [4, 6, 3, 5])  # 1, 3, 4 and 6 are empty
    features = (directions[np.repeat([0, 1, 2, 3], [4, 6, 3, 5])] + rng.normal(0, 0.05, (18, 5))).astype(np.float32)
    features *= rng.uniform(1, 9, (18, 1)).astype(np.float32)  # lengths do not count
    merges = order_merges(features, assignments)
    assert [sorted([*merge.first, *merge.second]) for merge in merges] == [[0, 2], [0, 2, 5], [0, 2, 5, 7]]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = 1 - np.mean([unit[i] @ unit[j] for i in range(4) for j in range(4, 10)])
    assert merges[0].distance == pytest.approx(expected, abs=1e-6)


def test_a_single_cluster_merges_with_none() -> None:
    assert order_merges(np.ones((3, 2), np.float32), np.zeros(3, int)) == []
