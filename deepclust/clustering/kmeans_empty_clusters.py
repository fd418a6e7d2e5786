"""How k-means treats clusters that have lost all of their rows."""

from torch import Tensor

from deepclust.clustering.kmeans_distances import KMeansData, distances_to_own_centroids


def relocate_empty_clusters(
    data: KMeansData, means: Tensor, counts: Tensor, old_centroids: Tensor, assignments: Tensor
) -> Tensor:
    """Return the next centroids (R, K, D): `means` (R, K, D), with a new place for each cluster whose count is 0.

    cosine
        An empty cluster becomes the zero vector, which has the distance 1 from every row. It wins back the rows whose
        cosine with every other centroid is negative.
    euclidean
        The first empty cluster moves to the row that is farthest from its own centroid, the next one to the second
        farthest, and so on. Once no other row is off its own centroid, an empty cluster stays at its old centroid.

    `counts` (R, K) are the sizes of the clusters, `old_centroids` (R, K, D) and `assignments` (R, M) those before the
    step. The means of empty clusters are ignored.
    """
    has_rows = (counts > 0)[..., None]
    centroids = means.where(has_rows, 0 if data.is_cosine else old_centroids)
    if not data.is_cosine:
        for restart in (~has_rows).any(1)[:, 0].nonzero()[:, 0].tolist():
            distances = distances_to_own_centroids(data, centroids[restart], assignments[restart])
            empty = (counts[restart] == 0).nonzero()[:, 0]
            farthest = distances.argsort(descending=True, stable=True)[: len(empty)]
            farthest = farthest[distances[farthest] > 0]
            centroids[restart, empty[: len(farthest)]] = data.rows[farthest]
    return centroids
