"""Smoothing over a graph, against the formula with dense matrices."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from deepclust.clustering.graph_smoothing import make_adjacency, smooth_over_graph


def smooth_dense(features, adjacency, num_steps):
    with_loops = adjacency - np.diag(np.diag(adjacency)) + np.eye(len(adjacency))
    degrees = with_loops.sum(1)
    return np.linalg.matrix_power(with_loops / np.sqrt(np.outer(degrees, degrees)), num_steps) @ features


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_equals_the_formula_with_loops_and_a_lone_node(num_steps):
    random = np.random.default_rng(0)
    adjacency = random.integers(0, 2, (9, 9))
    adjacency = np.triu(adjacency) + np.triu(adjacency, 1).T  # with loops
    adjacency[4] = adjacency[:, 4] = 0
    features = random.normal(size=(9, 3))
    smoothed = smooth_over_graph(features, csr_array(adjacency.astype(float)), num_steps)
    np.testing.assert_allclose(smoothed, smooth_dense(features, adjacency, num_steps), rtol=1e-12)
    np.testing.assert_array_equal(smoothed[4], features[4])


def test_edges_count_once_whichever_way_they_are_given():
    edges = np.array([[0, 1, 2, 0, 3], [1, 0, 1, 1, 3]])
    expected = np.zeros((4, 4))
    expected[[0, 1, 1, 2, 3], [1, 0, 2, 1, 3]] = 1
    np.testing.assert_array_equal(make_adjacency(edges, 4).toarray(), expected)


def test_a_graph_without_edges_leaves_features_as_they_are():
    features = np.random.default_rng(1).normal(size=(5, 2))
    adjacency = make_adjacency(np.zeros((2, 0), np.int64), 5)
    np.testing.assert_array_equal(smooth_over_graph(features, adjacency, 3), features)
