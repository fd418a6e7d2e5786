"""k-means on several processes gives the result of one."""

import torch

from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from tests.clustering.kmeans_reference import KEY, SETTINGS, make_blobs
from tests.processes import run_on_processes


def run_kmeans(_):
    """Return the results with 2 and with 7 restarts."""
    rows = make_blobs(200, 5, 6)
    settings = {"num_clusters": 6, "metric": "cosine", "key": KEY, **SETTINGS}
    results = [kmeans_on_all_ranks(rows, num_restarts=num_restarts, **settings) for num_restarts in (2, 7)]
    return [(r.centroids, r.assignments, r.inertia, r.iterations, r.restart) for r in results]


def test_all_ranks_get_the_best_of_all_restarts_also_where_some_have_none(tmp_path):
    expected = run_kmeans(0)
    for results_of_rank in run_on_processes(run_kmeans, 3, tmp_path):
        for result_of_rank, result in zip(results_of_rank, expected, strict=True):
            rank_centroids, rank_assignments, *rank_numbers = result_of_rank
            centroids, assignments, *numbers = result
            assert torch.equal(rank_centroids, centroids) and torch.equal(rank_assignments, assignments)
            assert rank_numbers == numbers
