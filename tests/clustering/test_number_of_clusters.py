"""The estimated number of clusters where it is known, and where there are none to find."""

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs

from deepclust.clustering.number_of_clusters import (
    MAX_ROWS,
    ClusterNumberEstimate,
    compute_eigengaps,
    estimate_number_of_clusters,
    numbers_to_try,
    pick_number,
    sample_rows,
)
from deepclust.errors import InputError


def sample_blobs(num_blobs: int, *, num_rows: int = 200, spread: float = 1.0) -> torch.Tensor:
    rows, _ = make_blobs(num_rows, 8, centers=num_blobs, cluster_std=spread, center_box=(-12, 12), random_state=3)
    return torch.from_numpy(rows).float()


@pytest.mark.parametrize("number", [3, 8])
def test_separate_blobs_are_counted(number: int):
    estimate = estimate_number_of_clusters(sample_blobs(number, num_rows=20 * number), seed=0)
    assert estimate.num_clusters == number and estimate.num_agreeing == 3 and "all three agree" in estimate.summarize()
    assert [k for k, _ in estimate.curves["silhouette"]] == numbers_to_try(2 * number)
    assert [k for k, _ in estimate.curves["eigengap"]] == list(range(2, 2 * number + 1))


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
    assert estimate_number_of_clusters(torch.ones(40, 3), seed=0).named["silhouette"] == 1


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


def test_eigengaps_of_separate_parts():
    gaps = compute_eigengaps(sample_blobs(5, num_rows=100, spread=0.01), 9)
    assert np.argmax(gaps) + 1 == 5 and sum(gaps[:4]) == pytest.approx(0, abs=1e-9)


def test_of_nearly_equal_values_the_largest_number_is_picked():
    curve = [(2, 0.50), (3, 0.51), (4, 0.495), (5, 0.2)]
    assert pick_number(curve, margin=0.1, tie=0) == 3
    assert pick_number(curve, margin=0.1, tie=0.02) == 4
    assert pick_number(curve, margin=0.6, tie=0.02) == 1


def test_the_summary_says_how_far_the_measures_agree():
    def summarize(*named: int) -> str:
        numbers = dict(zip(("silhouette", "stability", "eigengap"), named, strict=True))
        return ClusterNumberEstimate(sorted(named)[1], numbers, {}).summarize()

    assert summarize(5, 5, 5).endswith("all three agree") and summarize(10, 11, 9).endswith("all three agree")
    assert summarize(2, 10, 11).startswith("10 clusters") and summarize(2, 10, 11).endswith("two of three agree")
    assert summarize(2, 10, 30).endswith("take it as a guess")
