"""The estimated number of clusters where it is known, and where there are none to find."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, make_blobs
from sklearn.metrics import davies_bouldin_score

from deepclust.clustering.number_of_clusters import (
    COARSE,
    FINE,
    MAX_ROWS,
    ClusterNumberEstimate,
    build_graph,
    compute_separations,
    estimate_number_of_clusters,
    find_communities,
    numbers_to_try,
    run_kmeans,
    sample_rows,
)
from deepclust.errors import InputError
from deepclust.runs.results import describe_estimate


def sample_blobs(num_blobs: int, *, num_rows: int = 200, spread: float = 1.0) -> torch.Tensor:
    rows, _ = make_blobs(num_rows, 8, centers=num_blobs, cluster_std=spread, center_box=(-12, 12), random_state=3)
    return torch.from_numpy(rows).float()


@pytest.mark.parametrize("number", [3, 8])
def test_separate_blobs_are_counted(number: int):
    estimate = estimate_number_of_clusters(sample_blobs(number, num_rows=20 * number), seed=0)
    assert estimate.num_clusters == number and estimate.num_agreeing == 3 and "all three agree" in estimate.summarize()
    assert [k for k, _ in estimate.curves["separation"]] == numbers_to_try(2 * number)
    assert number in dict(estimate.curves["communities"])


def test_an_elongated_cloud_is_one_cluster():
    cloud = torch.randn(150, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([9.0, 2, 1, 1, 1, 1])
    estimate = estimate_number_of_clusters(cloud, seed=0)
    assert estimate.num_clusters == 1
    with pytest.raises(InputError, match=r"one cloud.*set num_clusters=K"):
        estimate.require_several_clusters("num_clusters")


def test_estimates_are_repeatable_and_ignore_scale_origin_and_the_order_of_columns():
    rows = sample_blobs(4, num_rows=60)
    estimate = estimate_number_of_clusters(rows, seed=0)
    assert estimate == estimate_number_of_clusters(rows, seed=0)
    assert estimate.named == estimate_number_of_clusters(rows.flip(1) * 10 + 1000, seed=0).named
    assert estimate.curves != estimate_number_of_clusters(rows, seed=1).curves


def test_too_few_rows_and_identical_rows():
    with pytest.raises(InputError, match="19 images are too few"):
        estimate_number_of_clusters(torch.randn(19, 3), seed=0)
    assert estimate_number_of_clusters(torch.ones(20, 3), seed=0).num_clusters == 1
    assert estimate_number_of_clusters(torch.ones(40, 3), seed=0).named["separation"] == 1


@pytest.mark.parametrize(("number", "copies"), [(1, 60), (2, 60), (3, 60), (5, 40), (12, 25)])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_copies_are_no_more_clusters_than_there_are_distinct_rows(number: int, copies: int, noise: float):
    generator = torch.Generator().manual_seed(number)
    rows = torch.randn(number, 16, generator=generator).repeat(copies, 1)
    rows += noise * torch.randn(rows.shape, generator=generator)
    estimate = estimate_number_of_clusters(rows, seed=0)
    assert estimate.num_clusters <= number and (number < 3 or estimate.num_clusters == number)


def test_numbers_to_try_and_the_sample_of_rows():
    assert numbers_to_try(2) == [2] and numbers_to_try(1) == [2]
    assert numbers_to_try(20) == [*range(2, 17), 18, 20]
    assert sample_rows(50, 0).tolist() == list(range(50))
    sample = sample_rows(10**5, 0)
    assert len(np.unique(sample)) == MAX_ROWS and (np.diff(sample) > 0).all() and sample.max() < 10**5


def test_communities_of_separate_parts_and_their_modularity():
    graph = build_graph(sample_blobs(5, num_rows=100, spread=0.01))
    assert min(degree for _, degree in graph.degree) >= 10  # the nearest others, and those whose nearest a row is
    found = find_communities(graph, seed=0)
    # Five of nearly as many edges each, without one between them: 1 - 1/5.
    assert found[COARSE] == found[FINE] == (5, pytest.approx(0.8, abs=1e-3))
    numbers = [k for k, _ in find_communities(build_graph(torch.rand(200, 3)), seed=0).values()]
    assert numbers == sorted(numbers)


def test_separation_is_the_index_of_davies_and_bouldin_and_best_at_the_blobs():
    rows = sample_blobs(5, num_rows=100)
    curve = dict(compute_separations(rows, [2, 4, 5, 6, 9], seed=0))
    assert min(curve, key=lambda k: curve[k]) == 5
    assignments = run_kmeans(rows, 5, 0).assignments
    assert curve[5] == pytest.approx(davies_bouldin_score(rows, assignments))
    assert compute_separations(torch.ones(30, 2), [2, 3], seed=0) == []


def test_the_summary_says_how_far_the_measures_agree():
    def summarize(*named: int) -> str:
        numbers = dict(zip(("communities", "fine communities", "separation"), named, strict=True))
        return ClusterNumberEstimate(sorted(named)[1], numbers, {}).summarize()

    assert summarize(5, 5, 5).endswith("all three agree") and summarize(10, 11, 9).endswith("all three agree")
    assert summarize(2, 10, 11).startswith("10 clusters") and summarize(2, 10, 11).endswith("two of three agree")
    assert summarize(2, 10, 30).endswith("take it as a guess")


def make_estimate(communities: int, separation: int, fine: int) -> ClusterNumberEstimate:
    named = {"communities": communities, "fine communities": fine, "separation": separation}
    return ClusterNumberEstimate(separation, named, {})


def test_where_the_measures_disagree_the_candidates_are_named():
    estimate = make_estimate(9, 12, 16)
    found = [(c.num_clusters, c.named_by) for c in estimate.candidates]
    assert found == [(12, ["separation"]), (9, ["communities"]), (16, ["fine communities"])]
    assert not estimate.is_sure
    assert estimate.describe_doubt() == (
        "the number of clusters is unsure: 12 is the likeliest by the features alone; "
        "look at num_clusters=9 and num_clusters=16, too"
    )
    assert [c.num_clusters for c in make_estimate(5, 10, 10).candidates] == [10, 5, 7]  # one between the two
    assert [c.num_clusters for c in make_estimate(3, 3, 5).candidates] == [3, 5, 4]
    sure = make_estimate(9, 10, 11)
    assert sure.is_sure and sure.describe_doubt() is None
    assert [c.num_clusters for c in sure.candidates] == [10]
    assert json.loads(json.dumps(describe_estimate(estimate)))["candidates"][0] == {
        "num_clusters": 12,
        "named_by": ["separation"],
    }


def test_the_estimate_lies_between_the_numbers_of_communities():
    rows = torch.from_numpy(load_digits().data[:400]).float()
    estimate = estimate_number_of_clusters(rows, seed=0)
    assert estimate.named["communities"] <= estimate.num_clusters <= estimate.named["fine communities"]
    assert abs(estimate.num_clusters - 10) <= 1
