"""A graph of nearest neighbours whose weights are normalised row by row, and partners drawn along its edges.

The weights are those of UMAP (McInnes, Healy and Melville 2018, arXiv 1802.03426, section 3.1), as LNSCC uses them: in
every row the nearest other row has affinity 1 and all affinities add up to log2 k, wherever the row lies. All in
float64, all rows at once.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from deepclust.clustering.neighbors import nearest_neighbors

MAX_HALVINGS, TOLERANCE = 64, 1e-5  # of the bisection
MIN_SCALE = 1e-3  # of the mean distance


@dataclass(frozen=True)
class Graph:
    """Weighted edges in both directions: those of row i are `starts[i]` to `starts[i + 1]`, in the order of the ids."""

    starts: Tensor  # (M + 1,) int64
    neighbors: Tensor  # (E,) int64
    weights: Tensor  # (E,) float64 in (0, 1], alike in both directions

    def dense(self) -> Tensor:
        """All weights (M, M), 0 without an edge."""
        size = len(self.starts) - 1
        rows = torch.arange(size, device=self.starts.device).repeat_interleave(self.starts.diff())
        weights = self.weights.new_zeros(size, size)
        weights[rows, self.neighbors] = self.weights
        return weights


def neighbor_graph(rows: Tensor, k: int) -> Graph:
    """The graph of rows (M, D) and their exact `k` nearest by Euclidean distance, of which each row itself is one."""
    itself = torch.arange(len(rows), device=rows.device)
    distances, indices = nearest_neighbors(rows, rows, k - 1, metric="euclidean", exclude=itself)
    distances = pad(distances.double(), (1, 0))
    indices = torch.cat([itself[:, None], indices], 1)
    return union(indices, affinities(indices, distances, *local_scales(distances)))


def local_scales(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's affinities begin to fall, and how fast: rho and sigma (M,) of `distances` (M, k).

    The first column is a row's distance 0 to itself. rho is the smallest positive distance, 0 if there is none. With
    sigma the affinities of the other columns add up to log2 k, unless equal distances do not allow it; it is at least a
    thousandth of the row's mean distance, of the mean of all distances where rho is 0.
    """
    others = distances[:, 1:].double()
    rho = distances.double().masked_fill(distances <= 0, math.inf).amin(1)
    rho = rho.masked_fill(rho.isinf(), 0)
    beyond = (others - rho[:, None]).clamp(min=0)
    goal = math.log2(distances.shape[1])
    sigma, low, high = torch.ones_like(rho), torch.zeros_like(rho), torch.full_like(rho, math.inf)
    searching = torch.ones_like(rho, dtype=torch.bool)
    for _ in range(MAX_HALVINGS):
        excess = torch.exp(-beyond / sigma[:, None]).sum(1) - goal
        searching &= excess.abs() >= TOLERANCE
        if not searching.any():
            break
        high = torch.where(searching & (excess > 0), sigma, high)
        low = torch.where(searching & (excess <= 0), sigma, low)
        middle = torch.where(high.isinf(), 2 * sigma, (low + high) / 2)
        sigma = torch.where(searching, middle, sigma)
    means = distances.double().mean(1)
    return rho, sigma.maximum(MIN_SCALE * torch.where(rho > 0, means, means.mean()))


def affinities(indices: Tensor, distances: Tensor, rho: Tensor, sigma: Tensor) -> Tensor:
    """Affinities (M, k) in [0, 1] of each row to the rows `indices` at `distances` (M, k); 0 to itself."""
    beyond = distances.double() - rho[:, None]
    near = (beyond <= 0) | (sigma == 0)[:, None]
    values = torch.exp(-beyond / sigma[:, None]).masked_fill(near, 1)
    itself = torch.arange(len(indices), device=indices.device)[:, None]
    return values.masked_fill(indices == itself, 0)


def union(indices: Tensor, values: Tensor) -> Graph:
    """The symmetric graph of one-way affinities: w_ij = v_ij + v_ji - v_ij v_ji, v = `values` (M, k) of `indices`."""
    size, k = indices.shape
    rows = torch.arange(size, device=indices.device).repeat_interleave(k)
    there, back = rows * size + indices.flatten(), indices.flatten() * size + rows
    held = values.flatten() > 0
    pairs, places = torch.cat([there[held], back[held]]).unique(return_inverse=True)
    given = values.flatten()[held]
    forth_values, back_values = given.new_zeros(2, len(pairs))
    forth_values[places[: len(given)]] = given
    back_values[places[len(given) :]] = given
    return Graph(
        starts=torch.searchsorted(pairs, torch.arange(size + 1, device=pairs.device) * size),
        neighbors=pairs % size,
        weights=forth_values + back_values - forth_values * back_values,
    )


def multiplicities(weights: Tensor, *, most: int) -> Tensor:
    """How often an edge of each weight in [0, 1] counts, int64: its share of `most`, rounded down, or 0 below max/most.

    This is how often UMAP's optimiser (and LNSCC's list of training pairs) repeats it.
    """
    return (most * weights).floor().long().masked_fill(weights < weights.amax() / most, 0)


class Partners:
    """Draws neighbours of rows of a graph in proportion to the `counts` (E,) of its edges; on the CPU.

    A row drawn in proportion to `masses` (M,), the counts of all of its edges together, and then a neighbour of it are
    an edge drawn in proportion to its count.
    """

    def __init__(self, graph: Graph, counts: Tensor) -> None:
        self.neighbors = graph.neighbors.cpu()
        self.ends = counts.cpu().cumsum(0)
        bounds = pad(self.ends, (1, 0))[graph.starts.cpu()]
        self.starts = bounds[:-1]
        self.masses = bounds.diff()

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """A neighbour (N,) of each of `rows` (N,), none of which is without edges."""
        uniform = torch.rand(len(rows), dtype=torch.float64, generator=generator)
        places = self.starts[rows] + (uniform * self.masses[rows]).long()
        return self.neighbors[torch.searchsorted(self.ends, places, right=True)]
