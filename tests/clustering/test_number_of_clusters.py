"""The number of clusters where it is known, and where there is none to find."""

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs

from deepclust.clustering.number_of_clusters import (
    ROWS,
    Estimate,
    candidates,
    eigengaps,
    estimate_number,
    leading,
    sample_rows,
)
from deepclust.errors import InputError


def blobs(centres: int, *, rows: int = 200, size: int = 8, spread: float = 1.0) -> torch.Tensor:
    made, _ = make_blobs(rows, size, centers=centres, cluster_std=spread, center_box=(-12, 12), random_state=3)
    return torch.from_numpy(made).float()


@pytest.mark.parametrize("number", [3, 8])
def test_counts_blobs_that_are_apart(number: int):
    found = estimate_number(blobs(number, rows=20 * number), seed=0)
    assert found.num_clusters == number and found.agreeing == 3 and "all three agree" in found.summarize()
    assert [k for k, _ in found.curves["silhouette"]] == candidates(2 * number)
    assert [k for k, _ in found.curves["eigengap"]] == list(range(2, 2 * number + 1))


def test_one_cloud_is_one_cluster_however_long():
    cloud = torch.randn(150, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([9.0, 2, 1, 1, 1, 1])
    found = estimate_number(cloud, seed=0)
    assert found.num_clusters == 1
    with pytest.raises(InputError, match=r"one cloud.*set num_clusters=K"):
        found.require_several("num_clusters")


def test_the_same_again_and_whatever_the_order_of_columns_and_the_origin():
    rows = blobs(4, rows=60)
    found = estimate_number(rows, seed=0)
    assert found == estimate_number(rows, seed=0)
    assert found.named == estimate_number(rows.flip(1) * 10 + 1000, seed=0).named
    assert found.curves != estimate_number(rows, seed=1).curves


def test_too_few_rows_and_rows_all_alike():
    with pytest.raises(InputError, match="19 images are too few"):
        estimate_number(torch.randn(19, 3), seed=0)
    assert estimate_number(torch.ones(40, 3), seed=0).named["silhouette"] == 1


def test_candidates_and_the_sample():
    assert candidates(2) == [2] and candidates(1) == [2]
    assert candidates(20) == [*range(2, 17), 18, 20]
    assert sample_rows(50, 0).tolist() == list(range(50))
    drawn = sample_rows(10**5, 0)
    assert len(np.unique(drawn)) == ROWS and (np.diff(drawn) > 0).all() and drawn.max() < 10**5


def test_eigenvalues_of_separate_parts():
    gaps = eigengaps(blobs(5, rows=100, spread=0.01), 9)
    assert np.argmax(gaps) + 1 == 5 and sum(gaps[:4]) == pytest.approx(0, abs=1e-9)


def test_leading_takes_the_largest_of_nearly_equal_leads():
    curve = [(2, 0.50), (3, 0.51), (4, 0.495), (5, 0.2)]
    assert leading(curve, margin=0.1, nearly=0) == 3
    assert leading(curve, margin=0.1, nearly=0.02) == 4
    assert leading(curve, margin=0.6, nearly=0.02) == 1


def test_says_how_sure_it_is():
    def said(*named: int) -> str:
        numbers = dict(zip(("silhouette", "stability", "eigengap"), named, strict=True))
        return Estimate(sorted(named)[1], numbers, {}).summarize()

    assert said(5, 5, 5).endswith("all three agree") and said(10, 11, 9).endswith("all three agree")
    assert said(2, 10, 11).startswith("10 clusters") and said(2, 10, 11).endswith("two of three agree")
    assert said(2, 10, 30).endswith("take it as a guess")
