"""Greedy assignment of a batch in which every point that a cluster is given makes it more expensive for the others.

Mahon and Lukasiewicz (AAAI 2024, arXiv 2303.16521) call it combination assignment.
"""

import numpy as np
import torch
from torch import Tensor

from deepclust.errors import InputError


@torch.no_grad()
def greedy_log_count(costs: Tensor, counts: Tensor) -> Tensor:
    """Return assignments (N,) of points with `costs` (N, K) to clusters that hold `counts` (K,) points at the start.

    One pair of a point and a cluster after the other is chosen: of all unassigned points i and all clusters k, the pair
    with the smallest cost_ik + log(n_k + 1), where n_k counts the points that the cluster holds so far. On ties the
    lowest point wins, then the lowest cluster. A prior over the clusters is the cost -log prior_k.

    The choices depend on one another, so they are made on the CPU, in float64; a GPU is waited for. An assignment
    raises the cost of one cluster only, and so only points whose best cluster it was are looked at again.

    Raises:
        InputError: if the shapes disagree, there is no cluster, or a cost or a count is no finite number from 0 on
            (costs may be negative).
    """
    if costs.dim() != 2 or costs.shape[1] == 0 or counts.shape != costs.shape[1:]:
        raise InputError(
            f"costs have the shape {tuple(costs.shape)} and counts {tuple(counts.shape)}",
            expected="(N, K) and (K,) with a K of at least 1",
            do="give one cost for each point and cluster and one count for each cluster",
        )
    totals = costs.detach().cpu().double().numpy().copy()
    sizes = counts.cpu().double().numpy().copy()
    if num_bad := int((~np.isfinite(totals)).any(axis=1).sum()):
        raise InputError(
            f"{num_bad} of {len(totals)} points have costs that are not finite numbers",
            expected="finite costs",
            do="look at the embeddings and the centroids that they come from; in training, lower the learning rate",
        )
    if not (np.isfinite(sizes).all() and (sizes >= 0).all()):
        raise InputError(
            "a cluster holds a number of points that is negative or not finite",
            expected="counts from 0 on",
            do="give the number of points in each cluster, or zeros",
        )
    given = totals.copy()
    totals += np.log(sizes + 1)
    best_clusters = totals.argmin(axis=1)
    best_totals = totals.min(axis=1)  # infinite once a point is assigned
    assignments = np.empty(len(totals), dtype=np.int64)
    for _ in range(len(totals)):
        point = best_totals.argmin()
        cluster = best_clusters[point]
        assignments[point], best_clusters[point], best_totals[point] = cluster, -1, np.inf
        sizes[cluster] += 1
        totals[:, cluster] = given[:, cluster] + np.log(sizes[cluster] + 1)
        changed = np.flatnonzero(best_clusters == cluster)
        rows = totals[changed]
        best_clusters[changed] = rows.argmin(axis=1)
        best_totals[changed] = rows.min(axis=1)
    return torch.from_numpy(assignments).to(costs.device)
