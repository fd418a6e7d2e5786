"""Weighted graphs of nearest neighbours, by cosine or normalised around each row, and pairs drawn along their edges.

The weights of `build_neighbor_graph` are those of UMAP (McInnes, Healy and Melville 2018, arXiv 1802.03426, section
3.1), as LNSCC uses them. The affinities of each row to its k nearest start from 1 for the nearest other row and add up
to log2 k, wherever the row lies; then both directions of an edge are joined. All of it is computed in float64 and for
all rows at once.
"""

import math
from dataclasses import dataclass

import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import normalize, pad

from deepclust.clustering.neighbors import mine_neighbors, nearest_neighbors, neighbors_on_all_ranks

EDGES_AT_A_TIME = 2**16  # whose cosines are computed
MAX_HALVINGS, TOLERANCE = 64, 1e-5  # of the bisection for sigma
MIN_SCALE = 1e-3  # the smallest sigma, as a share of the mean distance


@dataclass(frozen=True)
class NeighborGraph:
    """A symmetric weighted graph. The edges of row i are `starts[i]` to `starts[i + 1]`, sorted by neighbour."""

    starts: Tensor  # (M + 1,) int64
    neighbors: Tensor  # (E,) int64
    weights: Tensor  # (E,) float64 in (0, 1], the same in both directions

    @property
    def num_rows(self) -> int:
        """The number of rows M."""
        return len(self.starts) - 1

    def to_sparse(self) -> csr_array:
        """Return all weights as a sparse array (M, M) of SciPy."""
        parts = self.weights.cpu().numpy(), self.neighbors.int().cpu().numpy(), self.starts.cpu().numpy()
        return csr_array(parts, shape=(self.num_rows, self.num_rows))

    def dense(self) -> Tensor:
        """Return all weights (M, M), 0 where there is no edge."""
        size = self.num_rows
        rows = torch.arange(size, device=self.starts.device).repeat_interleave(self.starts.diff())
        weights = self.weights.new_zeros(size, size)
        weights[rows, self.neighbors] = self.weights
        return weights


def build_neighbor_graph(rows: Tensor, k: int) -> NeighborGraph:
    """Build the graph of rows (M, D) and their exact `k` nearest by Euclidean distance, the row itself included."""
    itself = torch.arange(len(rows), device=rows.device)
    return weigh_neighbors(*nearest_neighbors(rows, rows, k - 1, metric="euclidean", exclude=itself))


def build_neighbor_graph_on_all_ranks(rows: Tensor, k: int) -> NeighborGraph:
    """Do what `build_neighbor_graph` does: all processes pass the same rows, share the search and get the same."""
    return weigh_neighbors(*neighbors_on_all_ranks(rows, k - 1, metric="euclidean", excludes_itself=True))


def weigh_neighbors(distances: Tensor, indices: Tensor) -> NeighborGraph:
    """Return the graph of rows and their neighbours `indices` at `distances` (M, k - 1), nearest first."""
    itself = torch.arange(len(indices), device=indices.device)
    distances = pad(distances.double(), (1, 0))
    indices = torch.cat([itself[:, None], indices], 1)
    rho, sigma = compute_local_scales(distances)
    return symmetrize(indices, compute_affinities(indices, distances, rho, sigma))


def build_cosine_graph(rows: Tensor, k: int) -> NeighborGraph:
    """Build the graph of rows (M, D) and their exact `k` nearest by cosine, the row itself included; all rows if M < k.

    The weight of an edge is the cosine of its rows, in float32 and at most 1. If one of them is not positive, all are
    (1 + cosine) / 2 instead, and rows in opposite directions have no edge. All processes share the search.
    """
    size = len(rows)
    table = mine_neighbors(rows, min(k, size) - 1)
    ends = table[:, 1:].flatten(), table[:, :1].expand(-1, table.shape[1] - 1).flatten()
    codes = (torch.minimum(*ends) * size + torch.maximum(*ends)).unique()
    first, second = codes // size, codes % size
    unit_rows, cosines = normalize(rows, dim=1), torch.empty(len(codes), dtype=torch.float32, device=rows.device)
    for start in range(0, len(codes), EDGES_AT_A_TIME):
        part = slice(start, start + EDGES_AT_A_TIME)
        cosines[part] = (unit_rows[first[part]].double() * unit_rows[second[part]].double()).sum(1)
    weights = cosines.clamp(max=1)
    if bool((weights <= 0).any()):
        weights = (1 + weights) / 2
    is_edge = (weights > 0).repeat(2)
    codes, order = torch.cat([codes, second * size + first])[is_edge].sort()
    return NeighborGraph(
        starts=torch.searchsorted(codes, torch.arange(size + 1, device=codes.device) * size),
        neighbors=codes % size,
        weights=weights.repeat(2)[is_edge][order].double(),
    )


def compute_local_scales(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each row's affinities begin to fall and how fast: rho and sigma (M,) of `distances` (M, k).

    The first column is the row's distance 0 to itself. rho is the smallest positive distance, 0 if there is none. sigma
    makes the affinities of the other columns add up to log2 k, unless equal distances rule that out. It is at least
    MIN_SCALE times the mean distance of the row, or times the mean of all distances where rho is 0.
    """
    others = distances[:, 1:].double()
    rho = distances.double().masked_fill(distances <= 0, math.inf).amin(1)
    rho = rho.masked_fill(rho.isinf(), 0)
    beyond_rho = (others - rho[:, None]).clamp(min=0)
    target_sum = math.log2(distances.shape[1])
    sigma, low, high = torch.ones_like(rho), torch.zeros_like(rho), torch.full_like(rho, math.inf)
    is_searching = torch.ones_like(rho, dtype=torch.bool)
    for _ in range(MAX_HALVINGS):
        excess = torch.exp(-beyond_rho / sigma[:, None]).sum(1) - target_sum
        is_searching &= excess.abs() >= TOLERANCE
        if not is_searching.any():
            break
        high = torch.where(is_searching & (excess > 0), sigma, high)
        low = torch.where(is_searching & (excess <= 0), sigma, low)
        middle = torch.where(high.isinf(), 2 * sigma, (low + high) / 2)
        sigma = torch.where(is_searching, middle, sigma)
    means = distances.double().mean(1)
    return rho, sigma.maximum(MIN_SCALE * torch.where(rho > 0, means, means.mean()))


def compute_affinities(indices: Tensor, distances: Tensor, rho: Tensor, sigma: Tensor) -> Tensor:
    """Return the affinities (M, k) in [0, 1] of each row to the rows `indices` at `distances` (M, k).

    exp(-(d - rho) / sigma), 1 up to the distance rho; 0 to the row itself.
    """
    beyond_rho = distances.double() - rho[:, None]
    is_one = (beyond_rho <= 0) | (sigma == 0)[:, None]
    affinities = torch.exp(-beyond_rho / sigma[:, None]).masked_fill(is_one, 1)
    itself = torch.arange(len(indices), device=indices.device)[:, None]
    return affinities.masked_fill(indices == itself, 0)


def symmetrize(indices: Tensor, affinities: Tensor) -> NeighborGraph:
    """Join both directions of one-way `affinities` v (M, k) to the rows `indices`: w_ij = v_ij + v_ji - v_ij v_ji."""
    size, k = indices.shape
    rows = torch.arange(size, device=indices.device).repeat_interleave(k)
    forward_codes, backward_codes = rows * size + indices.flatten(), indices.flatten() * size + rows
    is_edge = affinities.flatten() > 0
    codes, positions = torch.cat([forward_codes[is_edge], backward_codes[is_edge]]).unique(return_inverse=True)
    values = affinities.flatten()[is_edge]
    forward_values, backward_values = values.new_zeros(2, len(codes))
    forward_values[positions[: len(values)]] = values
    backward_values[positions[len(values) :]] = values
    return NeighborGraph(
        starts=torch.searchsorted(codes, torch.arange(size + 1, device=codes.device) * size),
        neighbors=codes % size,
        weights=forward_values + backward_values - forward_values * backward_values,
    )


def compute_multiplicities(weights: Tensor, *, max_multiplicity: int) -> Tensor:
    """Return how often an edge of each of `weights` (E,) in [0, 1] counts, int64.

    Its share of `max_multiplicity`, rounded down, or 0 where the weight is below the largest over `max_multiplicity`.
    This is how often UMAP's optimiser (and LNSCC's list of training pairs) repeats the edge.
    """
    multiplicities = (max_multiplicity * weights).floor().long()
    return multiplicities.masked_fill(weights < weights.amax() / max_multiplicity, 0)


class PartnerSampler:
    """Draws partners of rows among their neighbours in a graph, by the `multiplicities` (E,) of its edges; on the CPU.

    A row drawn in proportion to `row_totals` (M,), the sums over each row's edges, and then a partner of it are an edge
    drawn in proportion to its multiplicity.
    """

    def __init__(self, graph: NeighborGraph, multiplicities: Tensor) -> None:
        self.neighbors = graph.neighbors.cpu()
        self.running_totals = multiplicities.cpu().cumsum(0)
        totals_before = pad(self.running_totals, (1, 0))[graph.starts.cpu()]
        self.first_positions = totals_before[:-1]
        self.row_totals = totals_before.diff()

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a partner (N,) of each of `rows` (N,), all of which must have edges."""
        uniform = torch.rand(len(rows), dtype=torch.float64, generator=generator)
        positions = self.first_positions[rows] + (uniform * self.row_totals[rows]).long()
        return self.neighbors[torch.searchsorted(self.running_totals, positions, right=True)]
