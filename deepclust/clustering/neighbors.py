"""Exact nearest neighbours by exhaustive search, in chunks of queries."""

from typing import Literal

import torch
from torch import Tensor

from deepclust.clustering.kmeans import exact_products, require_finite
from deepclust.engine.progress import track
from deepclust.errors import InputError

CPU_ELEMENTS, GPU_ELEMENTS = 2**23, 2**27  # products held at a time


def nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    metric: Literal["inner_product", "euclidean"],
    exclude: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The `k` nearest `keys` (M, D) of each query (N, D), nearest first: products or distances (N, k), indices (N, k).

    Of equally near keys the one of the lowest index comes first. `exclude` (N,) names a key that is left out for each
    query, `torch.arange(M)` for the neighbours that rows have among themselves. Rows are taken as they are: normalise
    them for the cosine.
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
        euclidean = metric == "euclidean"
        # Far from the origin |q|^2 - 2 q.k + |k|^2 would lose the digits that tell the keys apart.
        if euclidean:
            origin = keys.mean(0)
            queries, keys = queries - origin, keys - origin
        biases = keys.square().sum(1) / -2 if euclidean else keys.new_zeros(1)
        values = queries.new_empty(len(queries), k)  # in one piece: many small ones would break up the memory
        indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        step = max((CPU_ELEMENTS if keys.device.type == "cpu" else GPU_ELEMENTS) // len(keys), 64)
        for start in track(range(0, len(queries), step), "nearest neighbours"):
            part = slice(start, start + step)
            rows = queries[part]
            scores = torch.addmm(biases, rows, keys.T)
            if exclude is not None:
                scores.scatter_(1, exclude[part, None], -torch.inf)
            top, found = scores.topk(min(k + 1, len(keys)))
            if top.shape[1] > k:
                tied = top[:, k - 1] == top[:, k]  # topk takes any of equal keys
                found[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, : k + 1]
            found = found[:, :k].sort(1).values
            # One by one, equal keys have equal values, and a row has distance zero from itself.
            others = keys[found]
            near = (rows[:, None] - others).norm(dim=2) if euclidean else (rows[:, None] * others).sum(2)
            values[part], order = near.sort(dim=1, descending=not euclidean, stable=True)
            indices[part] = found.gather(1, order)
        return values, indices
