"""k-means whose restarts are shared out over the processes of a run."""

import torch
from torch import Tensor

from deepclust.clustering.kmeans import KMeansResult, kmeans
from deepclust.clustering.kmeans_distances import Metric
from deepclust.engine import distributed


def kmeans_on_all_ranks(
    features: Tensor,
    *,
    num_clusters: int,
    metric: Metric,
    num_restarts: int,
    max_iterations: int,
    tolerance: float,
    key: tuple[int | str, ...],
) -> KMeansResult:
    """Return the best of `num_restarts` restarts of k-means on features (M, D); it is the same on all processes.

    Every process passes the same features. Restart r runs on process r modulo the number of processes, and its outcome
    does not depend on where it runs. So any number of processes gives the result of one.
    """
    own_restarts = range(distributed.rank(), num_restarts, distributed.world_size())
    best = kmeans(
        features,
        num_clusters=num_clusters,
        metric=metric,
        restarts=own_restarts or [0],  # a process without a restart repeats the first, which cannot change the best
        max_iterations=max_iterations,
        tolerance=tolerance,
        key=key,
    )
    if distributed.world_size() == 1:
        return best
    own_summary = torch.tensor([[best.inertia, best.restart, best.iterations]], dtype=torch.float64)
    summaries = distributed.all_gather(own_summary.to(features.device)).tolist()
    winner = min(range(len(summaries)), key=lambda process: (*summaries[process][:2], process))
    inertia, restart, iterations = summaries[winner]
    return KMeansResult(
        centroids=distributed.broadcast(best.centroids.contiguous(), winner),
        assignments=distributed.broadcast(best.assignments.contiguous(), winner),
        inertia=inertia,
        iterations=int(iterations),
        restart=int(restart),
    )
