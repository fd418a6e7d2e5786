"""Distances of cluster means in a kernel space: against loops over pairs, and with empty clusters and equal rows."""

import math

import pytest
import torch

from deepclust.losses.kernel_means import kernel_mean_distances, mean_where

FACTORS = (0.5, 1.0, 2.0)


def find_distance_slowly(first, second, rows):
    """Return the squared distance of the means of two lists of rows in the kernel space of all `rows`."""
    squares = [float((a - b).square().sum()) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    width = sum(squares) / len(squares)

    def mean_kernel(left, right):
        values = [
            sum(math.exp(-float((a - b).square().sum()) / (f * width)) for f in FACTORS) / len(FACTORS)
            for a in left
            for b in right
        ]
        return sum(values) / len(values)

    return mean_kernel(first, first) + mean_kernel(second, second) - 2 * mean_kernel(first, second)


def test_distances_are_those_of_a_loop_over_pairs():
    torch.manual_seed(0)
    first, second = torch.randn(5, 3).double(), torch.randn(4, 3).double() + 1
    first_clusters, second_clusters = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([1, 2, 2, 2])
    distances, counts, _ = kernel_mean_distances(
        *(first, first_clusters, second, second_clusters), num_clusters=4, width_factors=FACTORS
    )
    assert counts.nonzero().tolist() == [[0, 1], [0, 2], [2, 1], [2, 2]]
    for j, k in counts.nonzero().tolist():
        expected = find_distance_slowly(
            first[first_clusters == j], second[second_clusters == k], torch.cat([first, second])
        )
        assert float(distances[j, k]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_equal_rows_are_at_no_distance_and_have_no_gradient(num_rows, offset):
    first = torch.full((num_rows, 4), offset + 0.1, requires_grad=True)
    second = torch.full((2, 4), offset + 0.1, requires_grad=True)
    ids = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    distances, _, width = kernel_mean_distances(first, ids[0], second, ids[1], num_clusters=1, width_factors=FACTORS)
    distances.sum().backward()
    assert abs(distances.item()) < 1e-6 and width.item() == pytest.approx(1e-12)
    assert not first.grad.any() and not second.grad.any()


def test_small_differences_far_from_zero_count():
    rows = torch.tensor([[0.0], [1.0], [4.0]])
    ids = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    near, far = (
        kernel_mean_distances(r[:2], ids[0], r[2:], ids[1], num_clusters=1, width_factors=FACTORS)[0]
        for r in (rows, rows + 2**20)
    )
    assert torch.equal(near, far) and near > 0.1


def test_mean_of_no_values_is_zero_with_a_gradient_of_zero():
    values = torch.ones(3, requires_grad=True)
    mean = mean_where(values, torch.zeros(3, dtype=torch.bool))
    mean.backward()
    assert mean == 0 and torch.equal(values.grad, torch.zeros(3))
