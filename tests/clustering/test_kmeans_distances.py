"""The nearest centroids against distances in float64, and the rule for ties."""

import pytest
import torch
from torch.nn.functional import normalize

from deepclust.clustering.kmeans_distances import nearest_centroids
from tests.clustering.kmeans_reference import METRICS, make_blobs, normalize_row


def slow_distances(rows, centroid, metric):
    rows, centroid = rows.double(), centroid.double()
    if metric == "cosine":
        return 1 - (normalize(rows, dim=1) * normalize_row(centroid)).sum(1)
    return (rows - centroid).square().sum(1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_centroids_equal_plain_loops_over_several_chunks(metric, dtype):
    rows, centroids = make_blobs(600, 3, 5, dtype=dtype), make_blobs(1500, 3, 5, seed=1, dtype=dtype)
    assignments, distances = nearest_centroids(rows, centroids, metric=metric)
    expected = torch.stack([slow_distances(rows, centroid, metric) for centroid in centroids], 1)
    assert torch.equal(assignments, expected.argmin(1))
    torch.testing.assert_close(distances, expected.amin(1).to(dtype), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_clusters", range(2, 20))
def test_of_equal_centroids_the_lowest_id_wins(metric, dtype, num_clusters):
    rows = make_blobs(300, 33, 3, dtype=dtype)
    assignments, _ = nearest_centroids(rows, rows[:1].expand(num_clusters, -1), metric=metric)
    assert assignments.eq(0).all()
    assignments, _ = nearest_centroids(rows, torch.cat([rows[1:2], rows[:1], rows[1:2], rows[:1]]), metric=metric)
    assert assignments.max() == 1
