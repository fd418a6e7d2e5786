"""k-means on several processes gives the result of one."""

import torch

from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from tests.clustering.kmeans_reference import KEY, SETTINGS, make_blobs
from tests.processes import run_on_processes


def run_kmeans(_, num_restarts):
    rows = make_blobs(200, 5, 6)
    result = kmeans_on_all_ranks(rows, num_clusters=6, metric="cosine", num_restarts=num_restarts, key=KEY, **SETTINGS)
    return result.centroids, result.assignments, result.inertia, result.iterations, result.restart


def test_all_ranks_get_the_best_of_all_restarts_also_where_some_have_none(tmp_path):
    for num_restarts in (2, 7):
        centroids, assignments, *numbers = run_kmeans(0, num_restarts)
        for rank_centroids, rank_assignments, *rank_numbers in run_on_processes(run_kmeans, 3, tmp_path, num_restarts):
            assert torch.equal(rank_centroids, centroids) and torch.equal(rank_assignments, assignments)
            assert rank_numbers == numbers
