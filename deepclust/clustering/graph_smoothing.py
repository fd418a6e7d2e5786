"""Features of the nodes of a graph, averaged over their neighbours: the low-pass filter of graph clustering."""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array, eye_array


def make_adjacency(edges: NDArray[np.int64], num_nodes: int) -> csr_array:
    """Return the symmetric 0/1 matrix (M, M) of edges (2, E), each of which may be given once or in both directions."""
    ends = np.concatenate([edges, edges[::-1]], 1)
    adjacency = csr_array((np.ones(ends.shape[1]), (ends[0], ends[1])), shape=(num_nodes, num_nodes))
    adjacency.sum_duplicates()
    adjacency.data[:] = 1
    return adjacency


def smooth_over_graph(features: NDArray[np.float64], adjacency: csr_array, num_steps: int) -> NDArray[np.float64]:
    """Return P^t X of features X (M, D) with P = D^-1/2 (A + I)^T D^-1/2, in float64.

    A is the adjacency (M, M) without loops and D holds the row sums of A + I. A node without edges keeps its features.
    """
    identity = eye_array(adjacency.shape[0])
    with_loops = adjacency - diags_array(adjacency.diagonal()) + identity
    scale = diags_array(with_loops.sum(1) ** -0.5)
    propagation = csr_array((with_loops @ scale).T @ scale)
    for _ in range(num_steps):
        features = propagation @ features
    return features
