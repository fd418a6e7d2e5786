"""Where k-means puts clusters without rows."""

import torch

from deepclust.clustering.kmeans import kmeans_from_centroids
from deepclust.clustering.kmeans_distances import KMeansData, nearest_centroids
from deepclust.clustering.kmeans_empty_clusters import relocate_empty_clusters
from tests.clustering.kmeans_reference import SETTINGS


def test_an_empty_cosine_cluster_becomes_the_zero_vector_and_can_win_rows_back():
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.1]])
    starts = torch.tensor([[0.5, 0.4], [1.0, 0.0], [3.0, -3.0]])
    # All three are nearest to start 0 or 1; cluster 2 becomes zero and takes the row with negative cosines.
    result = kmeans_from_centroids(rows, starts, metric="cosine", max_iterations=1, tolerance=0.0)
    assert result.centroids[2].tolist() == [0, 0]
    assignments, distances = nearest_centroids(rows, result.centroids, metric="cosine")
    assert assignments.tolist() == result.assignments.tolist()
    assert distances[assignments == 2].eq(1).all()
    assert nearest_centroids(rows, torch.zeros(2, 2), metric="cosine")[1].eq(1).all()


def test_an_empty_euclidean_cluster_takes_the_farthest_row():
    rows = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    result = kmeans_from_centroids(rows, torch.tensor([[1.0], [100.0]]), metric="euclidean", **SETTINGS)
    assert result.assignments.tolist() == [0, 0, 0, 1]
    assert result.centroids.tolist() == [[1], [9]]


def test_several_empty_euclidean_clusters_take_the_farthest_rows_in_turn_as_long_as_there_are_any():
    rows = torch.tensor([[-5.0], [0.0], [0.0], [6.0]], dtype=torch.float64)
    data = KMeansData(rows, "euclidean")
    means = torch.tensor([[[0.0], [torch.nan], [torch.nan], [torch.nan]]], dtype=torch.float64) - data.origin
    old_centroids = torch.tensor([[[1.0], [70.0], [80.0], [90.0]]], dtype=torch.float64) - data.origin
    centroids = relocate_empty_clusters(
        data,
        means,
        counts=torch.tensor([[4, 0, 0, 0]]),
        old_centroids=old_centroids,
        assignments=torch.zeros(1, 4, dtype=torch.int64),
    )
    assert (centroids + data.origin).flatten().tolist() == [0, 6, -5, 90]
