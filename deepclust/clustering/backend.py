"""Which library searches for nearest centroids and neighbours, and how much k-means' seeding looks at.

These are settings of a whole run, like the number of threads: they hold for all that is called inside of
`clustering_settings`. Outside of it everything is computed by torch, exactly.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from deepclust.engine import distributed
from deepclust.errors import InputError

log = logging.getLogger(__name__)

Backend = Literal["torch", "faiss", "auto"]
NeighborIndex = Literal["flat", "ivf", "hnsw"]
SeedingRows = int | Literal["auto"] | None

# `seeding_rows_per_cluster: auto` takes a sample where rows times clusters are more than MAX_PAIRS. No data set of up
# to 100,000 images and 1,000 clusters has so many.
MAX_PAIRS, SAMPLED_ROWS_PER_CLUSTER = 10**8, 64
MIN_PRODUCTS_FOR_TIMING = 2**32  # multiplications of a search from which on `auto` times both libraries on a block


@dataclass(frozen=True)
class ClusteringSettings:
    """The keys of conf/clustering/default.yaml."""

    backend: Backend
    seeding_rows_per_cluster: SeedingRows
    neighbor_index: NeighborIndex
    neighbor_index_min_rows: int

    def num_seeding_rows(self, num_rows: int, num_clusters: int) -> int:
        """Return among how many of `num_rows` rows k-means looks for its first centroids."""
        per_cluster = self.seeding_rows_per_cluster
        if per_cluster == "auto":
            per_cluster = SAMPLED_ROWS_PER_CLUSTER if num_rows * num_clusters > MAX_PAIRS else None
        return num_rows if per_cluster is None else min(num_rows, per_cluster * num_clusters)


# What holds outside of a run, and held in runs from before there were these keys
EXACT = ClusteringSettings(
    backend="torch", seeding_rows_per_cluster=None, neighbor_index="flat", neighbor_index_min_rows=0
)
_current: ContextVar[ClusteringSettings] = ContextVar("clustering settings", default=EXACT)
_winners: dict[tuple[str | int, ...], bool] = {}  # whether faiss was the faster one, by kind of work and its sizes


def current_settings() -> ClusteringSettings:
    """Return the settings that hold here."""
    return _current.get()


@contextmanager
def clustering_settings(
    *,
    backend: Backend,
    seeding_rows_per_cluster: SeedingRows,
    neighbor_index: NeighborIndex,
    neighbor_index_min_rows: int,
) -> Iterator[None]:
    """Let k-means and the search for neighbours follow these settings inside the `with` block.

    Args:
        backend: torch, faiss, or the faster one of them where the work is large enough to time both on a block. With
            several processes `auto` is torch.
        seeding_rows_per_cluster: k-means++ chooses among so many rows for each cluster, drawn at random; None: among
            all; `auto`: among all up to MAX_PAIRS pairs of rows and clusters, else SAMPLED_ROWS_PER_CLUSTER.
        neighbor_index: how faiss searches for neighbours: exactly, or faster and approximately.
        neighbor_index_min_rows: the approximate ones are for at least so many rows; fewer are searched exactly.

    Raises:
        InputError: if faiss is asked for and not installed, or torch is to search approximately.
    """
    check_backend(backend, neighbor_index)
    token = _current.set(ClusteringSettings(backend, seeding_rows_per_cluster, neighbor_index, neighbor_index_min_rows))
    try:
        yield
    finally:
        _current.reset(token)


def check_backend(backend: Backend, neighbor_index: NeighborIndex) -> None:
    """Check that the library is installed and can do what is asked for.

    Raises:
        InputError: if not.
    """
    if backend == "faiss" and not is_faiss_installed():
        raise InputError(
            "clustering.backend is faiss, and faiss is not installed",
            expected="the package faiss",
            do="run pip install faiss-cpu, or train with clustering.backend=torch",
        )
    if neighbor_index != "flat" and backend != "faiss":
        raise InputError(
            f"clustering.neighbor_index is {neighbor_index} and clustering.backend is {backend}",
            expected="clustering.backend=faiss, which alone searches approximately",
            do="set clustering.backend=faiss, or clustering.neighbor_index=flat",
        )


def is_faiss_installed() -> bool:
    """Return whether faiss can be imported, without importing it."""
    return find_spec("faiss") is not None


def takes_faiss(
    work: str,
    num_queries: int,
    keys_shape: Sequence[int],
    search_block: Callable[[bool], Tensor],
    *,
    device: torch.device,
) -> bool:
    """Return whether faiss is to do a search of `num_queries` rows among keys of shape (n, D), by the settings.

    With `backend: auto`, both libraries do `search_block(with_faiss)` where the whole is large enough to repay it. The
    answer is kept for searches of these sizes, and logged; `work` is the name of the search in the log.
    """
    backend = current_settings().backend
    if backend != "auto":
        return backend == "faiss"
    num_keys, num_features = keys_shape
    if num_queries * num_keys * num_features < MIN_PRODUCTS_FOR_TIMING or not is_faiss_installed():
        return False
    if distributed.world_size() > 1:  # each process would time by itself, and could then come to another result
        return False
    key = (work, num_keys, num_features, str(device), torch.get_num_threads())
    if key not in _winners:
        seconds = {with_faiss: _time(search_block, with_faiss) for with_faiss in (False, True)}
        _winners[key] = seconds[True] < seconds[False]
        log.info(
            "%s among %s x %s by %s: a block took faiss %.3f s and torch %.3f s",
            *(work, f"{num_keys:,}", num_features, "faiss" if _winners[key] else "torch"),
            *(seconds[True], seconds[False]),
        )
    return _winners[key]


def _time(search_block: Callable[[bool], object], with_faiss: bool) -> float:
    """Return the seconds of the faster one of two calls: the first one also imports and allocates."""
    seconds = []
    for _ in range(2):
        started_at = time.perf_counter()
        search_block(with_faiss)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started_at)
    return min(seconds)
