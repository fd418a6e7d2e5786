"""The greedy assignment against the naive one, which looks at every pair again in each step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepclust.clustering.greedy_assignment import greedy_log_count
from deepclust.errors import InputError


def assign_naively(costs, counts):
    costs, counts = costs.double().numpy(), counts.double().numpy().copy()
    unassigned, assignments = list(range(len(costs))), [-1] * len(costs)
    while unassigned:
        totals = costs[unassigned] + np.log(counts + 1)
        row, cluster = divmod(int(totals.argmin()), totals.shape[1])  # on ties the first in row-major order
        assignments[unassigned.pop(row)] = cluster
        counts[cluster] += 1
    return assignments


@given(
    points=st.integers(0, 25),
    clusters=st.integers(1, 8),
    levels=st.sampled_from([1, 2, 4, 1000]),  # how many different costs there are: few of them make ties
    scale=st.sampled_from([1e-3, 1.0, 1e3, 1e300]),
    largest_count=st.sampled_from([0, 1, 10**6]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_assignments_are_those_of_the_naive_way(points, clusters, levels, scale, largest_count, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-levels, levels, (points, clusters), generator=generator, dtype=torch.float64)
    costs = (min(scale, 1e30) if dtype == torch.float32 else scale) * steps / levels
    costs = costs.to(dtype)
    counts = torch.randint(largest_count + 1, (clusters,), generator=generator)
    costs_before, counts_before = costs.clone(), counts.clone()
    assert greedy_log_count(costs, counts).tolist() == assign_naively(costs, counts)
    assert torch.equal(costs, costs_before) and torch.equal(counts, counts_before)


def test_by_hand():
    zeros = torch.zeros(2, dtype=torch.int64)
    # The certain point comes first. The second pays log 2 in its cluster, which is less than 0.7 more, and the third
    # log 3 for the same, which is more.
    costs = torch.tensor([[0.2, 1.0], [0.0, 9.0], [0.1, 0.85]])
    assert greedy_log_count(costs, zeros).tolist() == [1, 0, 0]
    assert greedy_log_count(torch.zeros(7, 3), torch.zeros(3)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert greedy_log_count(torch.tensor([[5.0, 4.0]]), zeros).tolist() == [1]
    assert greedy_log_count(torch.tensor([[5.0, 4.0]]), torch.tensor([0, 9])).tolist() == [0]
    assert greedy_log_count(torch.randn(5, 1), torch.tensor([3])).tolist() == [0] * 5


def test_points_at_one_place_are_spread_over_all_clusters():
    costs = torch.rand(10, dtype=torch.float64).expand(200, 10) / 100
    assert torch.bincount(greedy_log_count(costs, torch.zeros(10)), minlength=10).tolist() == [20] * 10


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_are_not_finite_are_refused(value):
    costs = torch.zeros(4, 3)
    costs[2, 1] = value
    with pytest.raises(InputError, match="1 of 4 points"):
        greedy_log_count(costs, torch.zeros(3))
    with pytest.raises(InputError, match="negative or not finite"):
        greedy_log_count(torch.zeros(4, 3), torch.tensor([0, 1, value]))


@pytest.mark.parametrize("shapes", [((4, 0), (0,)), ((4, 3), (2,)), ((4,), (4,))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(InputError, match="have the shape"):
        greedy_log_count(*map(torch.zeros, shapes))
