"""The nearest centroids against distances in float64, and the rule for ties."""

import pytest
import torch
from torch.nn.functional import normalize

from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.kmeans_distances import centroid_logits, nearest_centroids, squared_distances
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


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset, spread", [(0, 1), (1e5, 1), (5e6, 20), (5e6, 150), (-3e4, 0.01)])
def test_the_largest_logit_is_where_k_means_has_put_a_row(metric, dtype, offset, spread):
    """Also where the coordinates of rows and centroids have few digits left for what tells them apart."""
    rows = (make_blobs(3000, 4, 5, dtype=torch.float64) * spread + offset).to(dtype)
    result = kmeans(
        rows, num_clusters=5, metric=metric, restarts=[0, 1], max_iterations=100, tolerance=1e-4, key=("test",)
    )
    logits = centroid_logits(rows, result.centroids, metric=metric)
    assert logits.dtype == dtype and logits.isfinite().all()
    assert torch.equal(logits.argmax(1), result.assignments)
    if metric == "euclidean":
        exact = squared_distances(rows.double(), result.centroids.double())
        torch.testing.assert_close(logits, (exact.amin(1, keepdim=True) - exact).to(dtype))


def test_distances_keep_their_digits_where_some_centroids_are_close_and_others_far():
    """A common origin does not help here; a product of float32 rows would see one centroid instead of two."""
    centroids = torch.tensor([[1e5, 0.0], [1e5, 1.0], [-1e5, 0.0]])
    rows = centroids.repeat(20, 1)
    assert torch.equal(squared_distances(rows, centroids)[:2, :2], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert torch.equal(centroid_logits(rows, centroids, metric="euclidean").argmax(1), torch.arange(3).repeat(20))
