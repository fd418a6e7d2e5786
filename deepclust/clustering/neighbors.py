"""Exact nearest neighbours by exhaustive search, in chunks of queries."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.clustering.exact_products import exact_products, require_finite
from deepclust.engine import distributed
from deepclust.engine.progress_bar import track
from deepclust.errors import InputError

CPU_CHUNK_PRODUCTS, GPU_CHUNK_PRODUCTS = 2**23, 2**27  # products of queries and keys that are in memory at a time


def nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    metric: Literal["inner_product", "euclidean"],
    exclude: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Find the `k` nearest `keys` (M, D) of each query (N, D); return products or distances (N, k) and indices (N, k).

    The nearest key comes first, and of equally near keys the one of the lowest index. `exclude` (N,) names one key that
    is left out for each query: `torch.arange(M)` for neighbours among the rows of one tensor. Rows are not normalised,
    so the inner product is the cosine only for unit rows.

    Raises:
        InputError: for a `k` above the number of keys, or rows that are not finite.
    """
    if k > len(keys) - (exclude is not None):
        raise InputError(
            f"{k} neighbours were asked for among {len(keys)} rows",
            expected="as many other rows at least",
            do="ask for fewer or give more rows",
        )
    require_finite(queries)
    require_finite(keys)
    with exact_products(keys.device):
        is_euclidean = metric == "euclidean"
        # Far from the origin |q|^2 - 2 q.k + |k|^2 would lose the digits that tell the keys apart.
        if is_euclidean:
            origin = keys.mean(0)
            queries, keys = queries - origin, keys - origin
        biases = keys.square().sum(1) / -2 if is_euclidean else keys.new_zeros(1)
        values = queries.new_empty(len(queries), k)  # in one piece: many small ones would break up the memory
        indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        chunk_size = max((CPU_CHUNK_PRODUCTS if keys.device.type == "cpu" else GPU_CHUNK_PRODUCTS) // len(keys), 64)
        for start in track(range(0, len(queries), chunk_size), "nearest neighbours"):
            chunk = slice(start, start + chunk_size)
            rows = queries[chunk]
            scores = torch.addmm(biases, rows, keys.T)
            if exclude is not None:
                scores.scatter_(1, exclude[chunk, None], -torch.inf)
            top_scores, nearest = scores.topk(min(k + 1, len(keys)))
            if top_scores.shape[1] > k:
                is_tied = top_scores[:, k - 1] == top_scores[:, k]  # topk takes any of equal keys
                nearest[is_tied] = scores[is_tied].sort(dim=1, descending=True, stable=True).indices[:, : k + 1]
            nearest = nearest[:, :k].sort(1).values
            # Computed pair by pair, equal keys have equal values, and a row has distance zero from itself.
            nearest_keys = keys[nearest]
            pair_values = (
                (rows[:, None] - nearest_keys).norm(dim=2) if is_euclidean else (rows[:, None] * nearest_keys).sum(2)
            )
            values[chunk], order = pair_values.sort(dim=1, descending=not is_euclidean, stable=True)
            indices[chunk] = nearest.gather(1, order)
        return values, indices


@torch.no_grad()
def mine_neighbors(features: Tensor, k: int) -> Tensor:
    """Return the indices (M, 1 + k) of each row of `features` (M, D) and its k nearest others by cosine, nearest first.

    Each process searches for its own part of the rows; all of them return the whole table.

    Raises:
        InputError: for a `k` above M - 1, or features that are not finite.
    """
    rows = F.normalize(features, dim=1)
    rank, processes = distributed.rank(), distributed.world_size()
    first, stop = (len(rows) * r // processes for r in (rank, rank + 1))
    own = torch.arange(first, stop, device=rows.device)
    nearest = nearest_neighbors(rows[first:stop], rows, k, metric="inner_product", exclude=own)[1]
    return distributed.all_gather(torch.cat([own[:, None], nearest], 1))


def draw_one_neighbor(neighbors: Tensor, generator: torch.Generator) -> Tensor:
    """Return one entry (N, 1) of each row of `neighbors` (N, k), with equal chances."""
    columns = torch.randint(neighbors.shape[1], (len(neighbors), 1), generator=generator)
    return neighbors.gather(1, columns)
