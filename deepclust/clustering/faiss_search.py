"""Searches by faiss (Johnson, Douze, Jégou, arXiv 1702.08734), in float32, on its GPU if this is how it was built.

Among equally near keys faiss takes any, and its rounding errors are not those of torch.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.clustering.backend import NeighborIndex, current_settings
from deepclust.engine.progress_bar import track
from deepclust.engine.randomness import make_generator

log = logging.getLogger(__name__)

QUERIES_AT_ONCE = 4096  # of an exhaustive search, after which progress is shown
NUM_RECALL_QUERIES = 1000  # rows whose neighbours are searched exactly too
MAX_TRAINING_ROWS_PER_LIST = 64  # from which the lists of an inverted file are made
HNSW_LINKS, HNSW_BREADTH_BUILT, HNSW_BREADTH_SEARCHED = 32, 80, 128


@contextmanager
def as_many_threads_as_torch() -> Iterator[Any]:
    """Yield faiss, which computes with torch's number of threads inside the `with` block."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)


def find_keys_by_faiss(queries: Tensor, keys: Tensor, k: int, exclude: Tensor | None, *, is_euclidean: bool) -> Tensor:
    """Return the `k` keys (N, k) of keys (M, D) that are nearest to each of queries (N, D), by rising index.

    `exclude` (N,) names a key that is left out for each query. The search is exhaustive, or where the settings say so
    and there are enough keys, approximate.
    """
    settings = current_settings()
    index = settings.neighbor_index if len(keys) >= settings.neighbor_index_min_rows else "flat"
    num_asked = k + (exclude is not None)
    if index == "flat":
        chunks = track(queries.split(QUERIES_AT_ONCE), f"neighbours by faiss ({len(queries):,} rows)")
        found = torch.cat([nearest_by_faiss(chunk, keys, num_asked, is_euclidean=is_euclidean) for chunk in chunks])
    else:
        found = approximate_nearest_by_faiss(queries, keys, num_asked, is_euclidean=is_euclidean, index=index)
    if exclude is not None:  # moved to the end, which is left out
        is_excluded = (found == exclude[:, None]).int()
        found = found.gather(1, is_excluded.sort(dim=1, stable=True).indices)[:, :k]
    return found.sort(1).values


def nearest_by_faiss(queries: Tensor, keys: Tensor, k: int, *, is_euclidean: bool) -> Tensor:
    """Return the `k` keys (N, k) of keys (M, D) that are nearest to each of queries (N, D), the nearest one first.

    They are those of the least Euclidean distance, or else of the largest inner product, by exhaustive search.
    """
    with as_many_threads_as_torch() as faiss:
        metric = faiss.METRIC_L2 if is_euclidean else faiss.METRIC_INNER_PRODUCT
        arrays = to_array(queries), to_array(keys)
        if queries.is_cuda and hasattr(faiss, "StandardGpuResources"):
            indices = faiss.knn_gpu(faiss.StandardGpuResources(), *arrays, k, metric=metric)[1]
        else:
            indices = faiss.knn(*arrays, k, metric)[1]
    return torch.from_numpy(indices.astype(np.int64, copy=False)).to(queries.device)


def approximate_nearest_by_faiss(
    queries: Tensor, keys: Tensor, k: int, *, is_euclidean: bool, index: NeighborIndex
) -> Tensor:
    """Return roughly what `nearest_by_faiss` returns, in less time: by an inverted file (ivf) or a graph (hnsw).

    The share of the true neighbours that it finds, of a sample of the queries, is logged. Queries for which it finds
    fewer than `k` keys are searched exhaustively. With several threads, faiss before 1.15 builds the graph in no fixed
    order.
    """
    num_lists = min(int(4 * math.sqrt(len(keys))), len(keys))  # none would be empty
    with as_many_threads_as_torch() as faiss:
        metric = faiss.METRIC_L2 if is_euclidean else faiss.METRIC_INNER_PRODUCT
        if index == "ivf":
            quantizer = faiss.IndexFlat(keys.shape[1], metric)
            searcher = faiss.IndexIVFFlat(quantizer, keys.shape[1], num_lists, metric)
            searcher.cp.max_points_per_centroid = MAX_TRAINING_ROWS_PER_LIST
            searcher.nprobe = max(num_lists // 32, 8)
        else:
            searcher = faiss.IndexHNSWFlat(keys.shape[1], HNSW_LINKS, metric)
            searcher.hnsw.efConstruction = HNSW_BREADTH_BUILT
            searcher.hnsw.efSearch = max(HNSW_BREADTH_SEARCHED, 2 * k)
        searcher.train(to_array(keys))
        searcher.add(to_array(keys))
        found = torch.from_numpy(searcher.search(to_array(queries), k)[1]).to(queries.device)
    incomplete = (found < 0).any(1).nonzero()[:, 0]
    if len(incomplete):
        found[incomplete] = nearest_by_faiss(queries[incomplete], keys, k, is_euclidean=is_euclidean)
    drawn = torch.randperm(len(queries), generator=make_generator("recall"))[:NUM_RECALL_QUERIES].to(queries.device)
    exact = nearest_by_faiss(queries[drawn], keys, k, is_euclidean=is_euclidean)
    recall = (found[drawn][:, :, None] == exact[:, None]).any(2).double().mean()
    log.info("%d nearest of %s by %s: recall %.4f of %d rows", k, f"{len(keys):,}", index, recall, len(drawn))
    return found


def to_array(rows: Tensor) -> np.ndarray:
    """Return rows (N, D) as float32 in one piece on the CPU, which is what faiss takes; a copy only where needed."""
    return np.ascontiguousarray(rows.detach().float().cpu().numpy())
