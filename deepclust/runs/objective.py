"""The objective of a run: one number without labels, by which a search over hyper-parameters compares its runs.

`silhouette`
    The mean silhouette (Rousseeuw 1987) of the clusters in the final features, from -1 to 1; higher is better. Of
    larger data sets it is that of a random sample.
`unexplained_variance`
    The inertia of the clusters over that of a single cluster, from 0 to 1; lower is better.

Both are computed for every method, on the features and clusters that are written to the run folder. Runs in which only
one cluster is used have the worst value. They compare settings of one method on one network: features that were trained
for something else have another geometry, in which the numbers mean something else.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from deepclust.clustering.kmeans_distances import float64_chunk_size
from deepclust.clustering.number_of_clusters import sample_rows
from deepclust.errors import InputError

ObjectiveName = Literal["silhouette", "unexplained_variance"]


def check_objective(name: Any) -> None:
    """Check the name of an objective; None stands for no objective.

    Raises:
        InputError: if there is none of that name.
    """
    if name is not None and name not in get_args(ObjectiveName):
        raise InputError(
            f"objective is {name}, and nothing is chosen by a score that has seen labels",
            expected=f"{' or '.join(get_args(ObjectiveName))}, or null for none",
            do=f"set objective={get_args(ObjectiveName)[0]}",
        )


def compute_objective(name: ObjectiveName, features: Tensor, assignments: Tensor, *, seed: int) -> dict[str, Any]:
    """Return what results.json says of an objective, from features (M, D) and assignments (M,).

    `value` is the objective, and `minimised` the number that a search is given: Hydra's sweepers minimise by default.
    """
    features, assignments = features.cpu(), assignments.cpu()
    if name == "silhouette":
        value = compute_silhouette(features, assignments, seed=seed)
        minimised = -value
    else:
        value = minimised = compute_unexplained_variance(features, assignments)
    return {"name": f"select/{name}", "value": value, "minimised": minimised}


def compute_silhouette(features: Tensor, assignments: Tensor, *, seed: int) -> float:
    """Return the mean silhouette of a sample of features (M, D); -1 where the sample lies in one cluster."""
    from sklearn.metrics import silhouette_score  # takes half a second

    sample = sample_rows(len(features), seed)
    rows, assignments = features[sample].double(), assignments[sample]
    if not 1 < assignments.unique().numel() < len(rows):
        return -1.0
    return float(silhouette_score((rows - rows.mean(0)).numpy(), assignments.numpy()))


def compute_unexplained_variance(features: Tensor, assignments: Tensor) -> float:
    """Return the mean squared distance of features (M, D) to their clusters' means, over that to the mean of all."""
    size = float64_chunk_size(features.device)
    chunks = [*zip(features.split(size), assignments.split(size), strict=True)]  # a copy of all in float64 is too large
    mean = torch.stack([rows.double().sum(0) for rows, _ in chunks]).sum(0) / len(features)
    sums = mean.new_zeros(int(assignments.max()) + 1, len(mean))
    for rows, clusters in chunks:
        sums.index_add_(0, clusters, rows.double() - mean)
    means = sums / torch.bincount(assignments)[:, None]
    within = total = mean.new_zeros(())
    for rows, clusters in chunks:
        centered = rows.double() - mean
        within, total = within + (centered - means[clusters]).square().sum(), total + centered.square().sum()
    least = 1e-12 * len(features)  # for identical rows, of which nothing is explained
    return min(1.0, float(within.clamp(min=least) / total.clamp(min=least)))
