"""Nearest neighbours by exhaustive search, in chunks of queries: exact, or by faiss where the settings say so."""

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.clustering.backend import takes_faiss
from deepclust.clustering.exact_products import exact_products, require_finite
from deepclust.engine import distributed
from deepclust.engine.progress_bar import track
from deepclust.errors import InputError

Metric = Literal["inner_product", "euclidean"]

CPU_CHUNK_PRODUCTS, GPU_CHUNK_PRODUCTS = 2**23, 2**27  # products of queries and keys that are in memory at a time
MAX_KEYS_AT_ONCE = 2**17  # of more keys, a block of BLOCK_KEYS at a time is compared with the queries
BLOCK_KEYS = 2**14
TIMED_QUERIES = 1024  # with which both libraries are timed
GROUP_SIZE = 10  # scores of which only the largest one is looked at first


def nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    metric: Metric,
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
        biases = keys.square().sum(1) / -2 if is_euclidean else None
        values = queries.new_empty(len(queries), k)  # in one piece: many small ones would break up the memory
        indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        block_size, chunk_size = choose_block_sizes(keys)

        def search(part: slice, with_faiss: bool) -> Tensor:
            rows, excluded = queries[part], None if exclude is None else exclude[part]
            if not with_faiss:
                return find_best_keys(rows, keys, biases, k, excluded, block_size)
            from deepclust.clustering.faiss_search import find_keys_by_faiss

            return find_keys_by_faiss(rows, keys, k, excluded, is_euclidean=is_euclidean)

        with_faiss = takes_faiss(
            "nearest neighbours", len(queries), keys.shape, partial(search, slice(0, TIMED_QUERIES)), device=keys.device
        )
        found = search(slice(None), True) if with_faiss else None
        for start in track(range(0, len(queries), chunk_size), "nearest neighbours"):
            chunk = slice(start, start + chunk_size)
            rows = queries[chunk]
            nearest = search(chunk, False) if found is None else found[chunk]
            # Computed pair by pair, equal keys have equal values, and a row has distance zero from itself.
            nearest_keys = keys.index_select(0, nearest.flatten()).unflatten(0, nearest.shape)  # faster than keys[...]
            pair_values = (
                (rows[:, None] - nearest_keys).norm(dim=2) if is_euclidean else (rows[:, None] * nearest_keys).sum(2)
            )
            values[chunk], order = pair_values.sort(dim=1, descending=not is_euclidean, stable=True)
            indices[chunk] = nearest.gather(1, order)
        return values, indices


def choose_block_sizes(keys: Tensor) -> tuple[int, int]:
    """Return how many of keys (M, D) are compared at a time, and with how many queries."""
    block_size = len(keys) if len(keys) <= MAX_KEYS_AT_ONCE else BLOCK_KEYS
    return block_size, max((CPU_CHUNK_PRODUCTS if keys.is_cpu else GPU_CHUNK_PRODUCTS) // block_size, 64)


def find_best_keys(
    rows: Tensor, keys: Tensor, biases: Tensor | None, k: int, exclude: Tensor | None, block_size: int
) -> Tensor:
    """Return the `k` keys (N, k) that each of rows (N, D) has the largest scores with, by rising index.

    The scores are the products with keys (M, D) plus `biases` (M,). `exclude` (N,) names a key that is left out
    for each row. The keys are compared with the rows in blocks of `block_size`, and the best of each block compete.
    """
    best_scores, best_keys = [], []
    for start in range(0, len(keys), block_size):
        block = slice(start, start + block_size)
        products = rows, keys[block].T
        scores = torch.mm(*products) if biases is None else torch.addmm(biases[block], *products)
        if exclude is not None:
            excluded = (exclude - start)[:, None]
            is_here = (excluded >= 0) & (excluded < scores.shape[1])
            excluded = torch.where(is_here, excluded, 0)
            scores.scatter_(1, excluded, scores.gather(1, excluded).masked_fill(is_here, -torch.inf))
        best = find_largest(scores, min(k, scores.shape[1]))
        if block_size >= len(keys):
            return best
        best_scores.append(scores.gather(1, best))
        best_keys.append(best + start)
    return torch.cat(best_keys, 1).gather(1, find_largest(torch.cat(best_scores, 1), k))


def find_largest(scores: Tensor, k: int) -> Tensor:
    """Return the places (N, k) of the `k` largest of each row of scores (N, M), by rising place.

    Of equal scores those at the first places are taken.
    """
    top_scores, places = top_by_groups(scores, min(k + 1, scores.shape[1]))
    if top_scores.shape[1] > k:
        is_tied = top_scores[:, k - 1] == top_scores[:, k]  # any of equal scores may be among the top
        places[is_tied] = scores[is_tied].sort(dim=1, descending=True, stable=True).indices[:, : k + 1]
    return places[:, :k].sort(1).values


def top_by_groups(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what `scores.topk(k)` returns, on a CPU in less time, for rows much longer than `k`.

    Each row of scores (N, M) falls into groups, and the `k` groups with the largest maxima hold the `k` largest scores.
    """
    num_groups = scores.shape[1] // GROUP_SIZE
    if not scores.is_cpu or num_groups < 64 * k:  # with fewer, topk is slow to choose the groups
        return scores.topk(k)
    grouped = scores[:, : GROUP_SIZE * num_groups].unflatten(1, (GROUP_SIZE, num_groups))
    groups = grouped.amax(1).topk(k, sorted=False).indices
    members = groups[:, None] + num_groups * torch.arange(GROUP_SIZE)[:, None]
    rest = torch.arange(GROUP_SIZE * num_groups, scores.shape[1]).expand(len(scores), -1)
    places = torch.cat([members.flatten(1), rest], 1)
    top_scores, best = scores.gather(1, places).topk(k)
    return top_scores, places.gather(1, best)


def neighbors_on_all_ranks(rows: Tensor, k: int, *, metric: Metric, excludes_itself: bool) -> tuple[Tensor, Tensor]:
    """Find the `k` nearest of rows (M, D) to each of them, with `excludes_itself` among the others only.

    Return products or distances (M, k) and indices (M, k), as `nearest_neighbors` does. Every process passes the same
    rows and searches for its own part of them; all of them return the same, also where an approximate search would find
    other neighbours on each. The exact search compares the same blocks of rows on any number of processes, so that its
    result is that of one.

    Raises:
        InputError: for a `k` above the number of rows to choose from, or rows that are not finite.
    """
    _, chunk_size = choose_block_sizes(rows)
    num_chunks = math.ceil(len(rows) / chunk_size)
    rank, processes = distributed.rank(), distributed.world_size()
    first, stop = (min(num_chunks * r // processes * chunk_size, len(rows)) for r in (rank, rank + 1))
    own = torch.arange(first, stop, device=rows.device) if excludes_itself else None
    values, indices = nearest_neighbors(rows[first:stop], rows, k, metric=metric, exclude=own)
    return distributed.all_gather(values), distributed.all_gather(indices)


@torch.no_grad()
def mine_neighbors(features: Tensor, k: int) -> Tensor:
    """Return the indices (M, 1 + k) of each row of `features` (M, D) and its k nearest others by cosine, nearest first.

    Each process searches for its own part of the rows; all of them return the whole table.

    Raises:
        InputError: for a `k` above M - 1, or features that are not finite.
    """
    rows = F.normalize(features, dim=1)
    nearest = neighbors_on_all_ranks(rows, k, metric="inner_product", excludes_itself=True)[1]
    return torch.cat([torch.arange(len(rows), device=rows.device)[:, None], nearest], 1)


def draw_one_neighbor(neighbors: Tensor, generator: torch.Generator) -> Tensor:
    """Return one entry (N, 1) of each row of `neighbors` (N, k), with equal chances."""
    columns = torch.randint(neighbors.shape[1], (len(neighbors), 1), generator=generator)
    return neighbors.gather(1, columns)
