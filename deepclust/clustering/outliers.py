"""Outliers: images that lie farther from their neighbours than these lie from theirs (scikit-learn's LOF)."""

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from deepclust.clustering.unit_rows import draw_rows, project_unit_rows

# Above the upper quartile of the factors, in interquartile ranges. Scikit-learn's threshold, a factor of 1.5, is never
# reached in features of many dimensions, where all distances are alike; see docs/photos.md.
FENCE = 2.0
NUM_NEIGHBORS = 30  # a few images of one foreign kind are still outliers
NUM_AXES = 128
MAX_FITTED = 10_000  # rows whose densities the others are compared with
BLOCK_ROWS = 8192


def score_outliers(
    features: NDArray[np.float32], *, seed: int, repeated: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Return the local outlier factor of each row (M, D) scaled to length 1: 1 within a group, larger outside (M,).

    Where there are more than `MAX_FITTED` rows, a sample of that size stands for all. `repeated` (M,) marks rows that
    are near-duplicates of others: they are scored but not fitted, because a place with many copies is no dense region.
    Where fewer rows than `NUM_NEIGHBORS` + 1 are left to fit, every factor is 1.

    Source: Breunig et al., "LOF: Identifying Density-Based Local Outliers" (2000), as in scikit-learn.
    """
    from sklearn.neighbors import LocalOutlierFactor

    kept = np.arange(len(features)) if repeated is None else np.flatnonzero(~repeated)
    fitted = kept[draw_rows(len(kept), MAX_FITTED, seed, "outliers")]
    scores = np.ones(len(features))
    if len(fitted) <= NUM_NEIGHBORS:
        return scores
    with threadpool_limits(limits=1):  # several threads add up in varying order
        points = project_unit_rows(features, NUM_AXES, seed=seed)
        factors = LocalOutlierFactor(NUM_NEIGHBORS, novelty=True, algorithm="brute").fit(points[fitted])
        scores[fitted] = -factors.negative_outlier_factor_
        others = np.setdiff1d(np.arange(len(features)), fitted)
        for start in range(0, len(others), BLOCK_ROWS):
            rows = others[start : start + BLOCK_ROWS]
            scores[rows] = -factors.score_samples(points[rows])
    return scores


def choose_outliers(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the positions of the factors (M,) that lie beyond the fence, the largest first."""
    lower, upper = np.quantile(scores, [0.25, 0.75]) if len(scores) else (0.0, 0.0)
    order = np.argsort(-scores, kind="stable")
    is_outlier = scores > upper + FENCE * (upper - lower)
    return order[is_outlier[order] & (upper > lower)]
