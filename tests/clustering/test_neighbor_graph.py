"""The normalised neighbour graph against equations solved row by row, and draws along its edges."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from deepclust.clustering.neighbor_graph import (
    Graph,
    Partners,
    affinities,
    local_scales,
    multiplicities,
    neighbor_graph,
    union,
)
from deepclust.errors import InputError


def rows_of(size=60, features=5, seed=0):
    return torch.randn(size, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def neighbors_of(rows, k):
    """Indices and distances (M, k), each row itself first."""
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(-1)
    distances, indices = distances.sort(dim=1, stable=True)
    return indices[:, :k], distances[:, :k].clamp(min=0)


def slow_weights(rows, k):
    """w (M, M) from the equations, row by row; only for rows whose distances are positive and differ."""
    indices, distances = (values.numpy() for values in neighbors_of(rows, k))
    v = np.zeros((len(rows), len(rows)))
    for i, (ids, to) in enumerate(zip(indices, distances, strict=True)):
        beyond = to[1:] - to[1]
        sigma = brentq(lambda s, x=beyond: np.exp(-x / s).sum() - math.log2(k), 1e-9, 1e9, xtol=1e-14)
        v[i, ids[1:]] = np.exp(-beyond / sigma)
    return v + v.T - v * v.T


@pytest.mark.parametrize("k", [3, 8, 59])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_those_of_the_equations(k, dtype):
    rows = rows_of()
    graph = neighbor_graph(rows.to(dtype), k)
    np.testing.assert_allclose(graph.dense(), slow_weights(rows, k), atol=2e-5)
    assert graph.weights.dtype == torch.float64 and graph.weights.max() <= 1


def test_rows_have_equal_mass_wherever_they_lie():
    rows = rows_of() * torch.logspace(-3, 3, 60)[:, None]  # a dense core and far outliers
    indices, distances = neighbors_of(rows, 8)
    rho, sigma = local_scales(distances)
    v = affinities(indices, distances, rho, sigma)
    torch.testing.assert_close(v.sum(1), torch.full_like(rho, 3.0), atol=1e-5, rtol=0)
    assert v[:, 1].eq(1).all() and not v[:, 0].any()
    assert torch.equal(rho, distances[:, 1])


def test_a_change_of_scale_or_origin_changes_nothing():
    rows = rows_of()
    torch.testing.assert_close(
        neighbor_graph(7 * rows + 3, 8).dense(), neighbor_graph(rows, 8).dense(), atol=2e-5, rtol=0
    )


def test_order_of_rows_is_immaterial():
    rows = rows_of()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    expected = neighbor_graph(rows, 8).dense()[order][:, order]
    torch.testing.assert_close(neighbor_graph(rows[order], 8).dense(), expected, atol=1e-12, rtol=0)


def test_identical_rows_have_weight_one_and_a_scale_above_zero():
    rows = rows_of(20)
    rows[:6] = rows[0]
    graph = neighbor_graph(rows, 5)
    weights = graph.dense()
    assert torch.equal(weights, weights.T) and not weights.diagonal().any()
    # Of six identical rows each takes the four first others: the fourth and fifth are no neighbours of one another.
    assert weights[:6, :4].fill_diagonal_(1).eq(1).all()
    distances = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    rho, sigma = local_scales(distances)
    assert rho.tolist() == [0, 2, 1]
    assert sigma.tolist() == pytest.approx([1e-3 * 4 / 9, 1e-3 * 2 / 3, 1e-3 * 2 / 3])
    v = affinities(torch.tensor([[0, 1, 2], [1, 0, 2], [2, 0, 1]]), distances, rho, sigma)
    assert v.tolist() == [[0, 1, 1]] * 3


def test_a_set_of_one_image_many_times_over():
    weights = neighbor_graph(torch.ones(9, 4), 4).dense()
    assert torch.isfinite(weights).all() and set(weights.unique().tolist()) == {0, 1}


def test_more_neighbours_than_rows_are_refused():
    with pytest.raises(InputError):
        neighbor_graph(rows_of(5), 6)


def test_union_by_hand():
    indices = torch.tensor([[0, 1], [1, 2], [2, 1]])
    graph = union(indices, torch.tensor([[0, 0.5], [0, 0.25], [0, 0.5]], dtype=torch.float64))
    assert graph.starts.tolist() == [0, 1, 3, 4] and graph.neighbors.tolist() == [1, 0, 2, 1]
    assert graph.weights.tolist() == [0.5, 0.5, 0.625, 0.625]


def test_multiplicities_are_rounded_down():
    weights = torch.tensor([1.0, 0.5, 0.0049, 0.005, 0.9999, 0.0], dtype=torch.float64)
    assert multiplicities(weights, most=200).tolist() == [200, 100, 0, 1, 199, 0]
    assert multiplicities(weights / 2, most=4).tolist() == [2, 1, 0, 0, 1, 0]


def test_partners_are_drawn_in_proportion_to_the_counts():
    graph = neighbor_graph(rows_of(12), 4)
    counts = multiplicities(graph.weights, most=20)
    counts[graph.starts[3]] = 0
    partners = Partners(graph, counts)
    wanted = Graph(graph.starts, graph.neighbors, counts.double()).dense()
    assert torch.equal(partners.masses.double(), wanted.sum(1))
    rows = torch.arange(12).repeat(4000)
    drawn = partners.draw(rows, torch.Generator().manual_seed(0))
    found = torch.bincount(rows * 12 + drawn, minlength=144).view(12, 12) / 4000
    torch.testing.assert_close(found.double(), wanted / wanted.sum(1, keepdim=True), atol=0.03, rtol=0)
    assert not found[wanted == 0].any()
    assert torch.equal(drawn, partners.draw(rows, torch.Generator().manual_seed(0)))
