"""The two losses of uneven cluster sizes at values that are known."""

import math

import pytest
import scipy.stats
import torch

from deepclust.losses.balance import cluster_size_entropy_deficit, squared_cluster_sizes


def test_cluster_size_entropy_deficit_is_log_k_minus_the_entropy_of_the_mean():
    p = torch.rand(20, 6, dtype=torch.float64).softmax(1)
    expected = math.log(6) - scipy.stats.entropy(p.mean(0))
    assert float(cluster_size_entropy_deficit(p)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_clusters", [1, 2, 10])
def test_balanced_and_collapsed(num_clusters):
    one_hot = torch.eye(num_clusters, dtype=torch.float64).repeat(3, 1)  # three images each
    n = len(one_hot)
    assert float(cluster_size_entropy_deficit(one_hot)) == pytest.approx(0, abs=1e-12)
    assert float(squared_cluster_sizes(one_hot)) == pytest.approx(n / num_clusters)
    collapsed = torch.zeros_like(one_hot)
    collapsed[:, 0] = 1
    assert float(cluster_size_entropy_deficit(collapsed)) == pytest.approx(math.log(num_clusters))
    assert float(squared_cluster_sizes(collapsed)) == pytest.approx(n)


def test_both_losses_by_hand():
    p = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0.5, 0.5, 0]])  # sizes 2.5, 1.5, 0
    expected = math.log(3) + 0.625 * math.log(0.625) + 0.375 * math.log(0.375)
    assert float(cluster_size_entropy_deficit(p)) == pytest.approx(expected, rel=1e-6)
    assert float(squared_cluster_sizes(p)) == pytest.approx((6.25 + 2.25) / 4)


def test_an_empty_cluster_has_no_gradient_of_its_own():
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    cluster_size_entropy_deficit(p).backward()
    assert torch.isfinite(p.grad).all() and not p.grad[:, 1].isnan().any()


@pytest.mark.parametrize("loss", [cluster_size_entropy_deficit, squared_cluster_sizes])
def test_full_precision_under_autocast(loss):
    p = torch.randn(64, 10).softmax(1)
    exact = loss(p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(p), exact)
        assert loss(p.bfloat16()).dtype == torch.float32
