"""The neighbour graph against its equations, solved row by row, and the draws along its edges."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from deepclust.clustering.neighbor_graph import (
    NeighborGraph,
    PartnerSampler,
    build_neighbor_graph,
    compute_affinities,
    compute_local_scales,
    compute_multiplicities,
    symmetrize,
)
from deepclust.errors import InputError


def make_rows(num_rows=60, seed=0):
    return torch.randn(num_rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_neighbors(rows, k):
    """Indices and distances (M, k), each row itself first."""
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(-1)
    distances, indices = distances.sort(dim=1, stable=True)
    return indices[:, :k], distances[:, :k].clamp(min=0)


def slow_weights(rows, k):
    """w (M, M) from the equations, row by row; only for rows whose distances are positive and differ."""
    indices, distances = (values.numpy() for values in slow_neighbors(rows, k))
    v = np.zeros((len(rows), len(rows)))
    for i, (ids, to) in enumerate(zip(indices, distances, strict=True)):
        beyond = to[1:] - to[1]
        sigma = brentq(lambda s, x=beyond: np.exp(-x / s).sum() - math.log2(k), 1e-9, 1e9, xtol=1e-14)
        v[i, ids[1:]] = np.exp(-beyond / sigma)
    return v + v.T - v * v.T


@pytest.mark.parametrize("k", [3, 8, 59])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_those_of_the_equations(k, dtype):
    rows = make_rows()
    graph = build_neighbor_graph(rows.to(dtype), k)
    np.testing.assert_allclose(graph.dense(), slow_weights(rows, k), atol=2e-5)
    assert graph.weights.dtype == torch.float64 and graph.weights.max() <= 1


def test_affinities_of_a_row_have_the_same_sum_wherever_it_lies():
    rows = make_rows() * torch.logspace(-3, 3, 60)[:, None]  # a dense core and far outliers
    indices, distances = slow_neighbors(rows, 8)
    rho, sigma = compute_local_scales(distances)
    v = compute_affinities(indices, distances, rho, sigma)
    torch.testing.assert_close(v.sum(1), torch.full_like(rho, 3.0), atol=1e-5, rtol=0)
    assert v[:, 1].eq(1).all() and not v[:, 0].any()
    assert torch.equal(rho, distances[:, 1])


def test_scale_and_origin_are_immaterial():
    rows = make_rows()
    torch.testing.assert_close(
        build_neighbor_graph(7 * rows + 3, 8).dense(), build_neighbor_graph(rows, 8).dense(), atol=2e-5, rtol=0
    )


def test_the_order_of_rows_is_immaterial():
    rows = make_rows()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    expected = build_neighbor_graph(rows, 8).dense()[order][:, order]
    torch.testing.assert_close(build_neighbor_graph(rows[order], 8).dense(), expected, atol=1e-12, rtol=0)


def test_identical_rows_have_weight_one_and_a_scale_above_zero():
    rows = make_rows(20)
    rows[:6] = rows[0]
    graph = build_neighbor_graph(rows, 5)
    weights = graph.dense()
    assert torch.equal(weights, weights.T) and not weights.diagonal().any()
    # Each of the six identical rows takes the first four others, so that the fifth and sixth are not neighbours.
    assert weights[:6, :4].fill_diagonal_(1).eq(1).all()
    distances = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    rho, sigma = compute_local_scales(distances)
    assert rho.tolist() == [0, 2, 1]
    assert sigma.tolist() == pytest.approx([1e-3 * 4 / 9, 1e-3 * 2 / 3, 1e-3 * 2 / 3])
    v = compute_affinities(torch.tensor([[0, 1, 2], [1, 0, 2], [2, 0, 1]]), distances, rho, sigma)
    assert v.tolist() == [[0, 1, 1]] * 3


def test_rows_that_are_all_identical():
    weights = build_neighbor_graph(torch.ones(9, 4), 4).dense()
    assert torch.isfinite(weights).all() and set(weights.unique().tolist()) == {0, 1}


def test_more_neighbours_than_rows_are_refused():
    with pytest.raises(InputError):
        build_neighbor_graph(make_rows(5), 6)


def test_symmetrize_by_hand():
    indices = torch.tensor([[0, 1], [1, 2], [2, 1]])
    graph = symmetrize(indices, torch.tensor([[0, 0.5], [0, 0.25], [0, 0.5]], dtype=torch.float64))
    assert graph.starts.tolist() == [0, 1, 3, 4] and graph.neighbors.tolist() == [1, 0, 2, 1]
    assert graph.weights.tolist() == [0.5, 0.5, 0.625, 0.625]


def test_multiplicities_are_rounded_down():
    weights = torch.tensor([1.0, 0.5, 0.0049, 0.005, 0.9999, 0.0], dtype=torch.float64)
    assert compute_multiplicities(weights, max_multiplicity=200).tolist() == [200, 100, 0, 1, 199, 0]
    assert compute_multiplicities(weights / 2, max_multiplicity=4).tolist() == [2, 1, 0, 0, 1, 0]


def test_partners_are_drawn_in_proportion_to_the_multiplicities():
    graph = build_neighbor_graph(make_rows(12), 4)
    multiplicities = compute_multiplicities(graph.weights, max_multiplicity=20)
    multiplicities[graph.starts[3]] = 0
    sampler = PartnerSampler(graph, multiplicities)
    expected = NeighborGraph(graph.starts, graph.neighbors, multiplicities.double()).dense()
    assert torch.equal(sampler.row_totals.double(), expected.sum(1))
    rows = torch.arange(12).repeat(4000)
    drawn = sampler.draw(rows, torch.Generator().manual_seed(0))
    frequencies = torch.bincount(rows * 12 + drawn, minlength=144).view(12, 12) / 4000
    torch.testing.assert_close(frequencies.double(), expected / expected.sum(1, keepdim=True), atol=0.03, rtol=0)
    assert not frequencies[expected == 0].any()
    assert torch.equal(drawn, sampler.draw(rows, torch.Generator().manual_seed(0)))
