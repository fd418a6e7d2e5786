"""k-means whose restarts are dealt over the processes of a run."""

import torch
from torch import Tensor

from deepclust.clustering.kmeans import KMeansResult, Metric, kmeans
from deepclust.engine import distributed


def dealt_kmeans(
    features: Tensor,
    *,
    num_clusters: int,
    metric: Metric,
    num_restarts: int,
    max_iterations: int,
    tolerance: float,
    key: tuple[int | str, ...],
) -> KMeansResult:
    """The best of `num_restarts` restarts over features (M, D) that every process holds; the same on all of them.

    Restart r runs on process r modulo their number, and its outcome does not depend on that, so any number of processes
    gives what one gives.
    """
    mine = range(distributed.rank(), num_restarts, distributed.world_size())
    best = kmeans(
        features,
        num_clusters=num_clusters,
        metric=metric,
        restarts=mine or [0],  # a process without a restart of its own repeats the first, which cannot change the best
        max_iterations=max_iterations,
        tolerance=tolerance,
        key=key,
    )
    if distributed.world_size() == 1:
        return best
    mine_said = torch.tensor([[best.inertia, best.restart, best.iterations]], dtype=torch.float64)
    said = distributed.gather(mine_said.to(features.device)).tolist()
    winner = min(range(len(said)), key=lambda process: (said[process][0], said[process][1], process))
    return KMeansResult(
        centroids=distributed.broadcast(best.centroids.contiguous(), winner),
        assignments=distributed.broadcast(best.assignments.contiguous(), winner),
        inertia=said[winner][0],
        iterations=int(said[winner][2]),
        restart=int(said[winner][1]),
    )
