"""Greedy k-means++ against plain loops in float64."""

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepclust.clustering.kmeans_seeding import seed_kmeans_plus_plus
from tests.clustering.kmeans_reference import METRICS, distance


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(METRICS), st.integers(1, 30), st.integers(1, 15), st.integers(0, 10**6))
@example("cosine", 14, 11, 13017)  # a tie when hardly any distance is left
def test_seeding_equals_plain_loops(metric, num_rows, num_clusters, seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_rows, 3))
    first, uniforms = rng.integers(0, num_rows, 2), rng.random((2, num_clusters - 1, 3))
    seeds = seed_kmeans_plus_plus(
        torch.from_numpy(rows), torch.from_numpy(first), torch.from_numpy(uniforms), metric=metric
    )
    for restart in range(2):
        expected = [first[restart]]
        distances = np.array([distance(row, rows[expected[0]], metric) for row in rows])
        for uniform in uniforms[restart][: max(num_rows - 1, 0)]:
            distances[expected] = 0
            candidates = np.searchsorted(distances.cumsum(), uniform * distances.sum())
            candidate_distances = [
                [min(d, distance(row, rows[c], metric)) for d, row in zip(distances, rows, strict=True)]
                for c in candidates
            ]
            totals = np.sum(candidate_distances, axis=1)
            best = (totals < totals.min() + 1e-12).argmax()  # two that are nearest to each other tie: the first
            expected.append(candidates[best])
            distances = np.array(candidate_distances[best])
        assert seeds[restart, : len(expected)].tolist() == expected
