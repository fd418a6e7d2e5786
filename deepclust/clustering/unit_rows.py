"""Rows drawn at random, scaled to unit length, and turned into the axes in which they differ most, block by block."""

import numpy as np
import torch
from numpy.typing import NDArray

from deepclust.engine.randomness import make_generator

BLOCK_ROWS = 4096  # read and scaled at once, so that no second copy of all rows is needed
MAX_SAMPLE = 5000  # rows from which the axes are found


def draw_rows(num_rows: int, max_rows: int, *key: int | str) -> NDArray[np.int64]:
    """Return all positions of `num_rows` rows in order, or `max_rows` of them drawn by the key."""
    if num_rows <= max_rows:
        return np.arange(num_rows)
    return np.sort(torch.randperm(num_rows, generator=make_generator(*key))[:max_rows].numpy())


def to_unit_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the rows (N, D) scaled to length 1; rows of zeros stay as they are."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32, copy=False)


def project_unit_rows(features: NDArray[np.float32], num_axes: int, *, seed: int) -> NDArray[np.float32]:
    """Return the rows of `features` (M, D), scaled to length 1, in up to `num_axes` principal axes: (M, d).

    The axes are orthonormal, so two rows are never farther apart here than they are in all D dimensions.
    """
    from sklearn.decomposition import PCA

    sample = to_unit_rows(features[draw_rows(len(features), MAX_SAMPLE, seed, "principal axes")])
    num_axes = min(num_axes, *sample.shape)
    pca = PCA(num_axes, svd_solver="covariance_eigh" if sample.shape[1] <= 4096 else "randomized", random_state=0)
    pca.fit(sample)
    axes = pca.components_.T.astype(np.float32)
    blocks = (features[start : start + BLOCK_ROWS] for start in range(0, len(features), BLOCK_ROWS))
    return np.concatenate([(to_unit_rows(block) - sample.mean(0)) @ axes for block in blocks])
