"""Plain loops in float64 that the tests hold k-means against, and data to run it on."""

import math

import numpy as np
import torch
from hypothesis import assume

METRICS = ("cosine", "euclidean")
SETTINGS = {"max_iterations": 300, "tolerance": 1e-4}
KEY = (0, "test")


def make_blobs(num_rows, num_features, num_clusters, *, noise=1.0, seed=0, dtype=torch.float32):
    """Rows (num_rows, num_features) scattered about random centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_clusters, num_features, generator=generator)
    rows = centres[torch.randint(num_clusters, (num_rows,), generator=generator)]
    return (rows + noise * torch.randn(num_rows, num_features, generator=generator)).to(dtype)


def normalize_row(row):
    length = math.sqrt(float(row @ row))
    return row / length if length > 0 else row


def distance(row, centroid, metric):
    if metric == "cosine":
        return 1 - float(normalize_row(row) @ normalize_row(centroid))
    return float(((row - centroid) ** 2).sum())


def slow_nearest(rows, centroids, metric):
    distances = [[distance(row, centroid, metric) for centroid in centroids] for row in rows]
    ids = [min(range(len(d)), key=lambda k: d[k] > min(d) + 1e-11) for d in distances]
    return ids, [d[k] for d, k in zip(distances, ids, strict=True)]


def slow_lloyd(rows, centroids, metric, *, max_iterations, tolerance):
    """Assignments, centroids and inertia of the best state, and the number of iterations."""
    rows = np.array([normalize_row(row) for row in rows]) if metric == "cosine" else rows
    limit = tolerance * rows.var(axis=0, ddof=1).mean() if len(rows) > 1 else 0
    assignments, distances = slow_nearest(rows, centroids, metric)
    best = None
    for iteration in range(1, max_iterations + 1):  # noqa: B007
        old, centroids = centroids, np.zeros_like(centroids)
        for k in range(len(centroids)):
            members = rows[[a == k for a in assignments]]
            if len(members) > 0:
                centroids[k] = members.mean(axis=0)
            elif metric == "euclidean":
                centroids[k] = old[k]
        if metric == "euclidean":
            own_distances = [distance(row, centroids[a], metric) for row, a in zip(rows, assignments, strict=True)]
            farthest = sorted(range(len(rows)), key=lambda i: -own_distances[i])
            ranked = [own_distances[i] for i in farthest[: len(centroids) + 1]]
            assume(set(assignments) == set(range(len(centroids))) or min(-np.diff(ranked)) > 1e-9)
            for k in range(len(centroids)):
                if k not in assignments and farthest and own_distances[farthest[0]] > 0:
                    centroids[k] = rows[farthest.pop(0)]
        new_assignments, distances = slow_nearest(rows, centroids, metric)
        if best is None or sum(distances) < best[2] - 1e-12:
            best = new_assignments, centroids, sum(distances)
        shift = sum(distance(a, b, metric) for a, b in zip(old, centroids, strict=True))
        is_repeated, assignments = new_assignments == assignments, new_assignments
        if is_repeated or shift <= limit:
            break
    return *best, iteration
