"""Distances between the means of sets of rows in a kernel space, as in maximum mean discrepancy.

Gretton, Borgwardt, Rasch, Schölkopf and Smola ("A kernel two-sample test", JMLR 13, 2012), section 2. A sum of Gaussian
kernels of several widths takes the place of one whose width would have to be chosen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepclust.engine.precision import full_precision
from deepclust.nn.one_hot import one_hot_mask


@full_precision
def kernel_mean_distances(
    first: Tensor,
    first_clusters: Tensor,
    second: Tensor,
    second_clusters: Tensor,
    *,
    num_clusters: int,
    width_factors: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the squared distances D (K, K) of cluster means in the kernel space, which count (K, K), and the width.

    D(j, l) = mean k(F_j, F_j) + mean k(S_l, S_l) - 2 mean k(F_j, S_l), where F_j are the rows of `first` (N, D) in
    cluster j by `first_clusters` (N,), and S_l those of `second` (M, D) in l. A pair counts if both have a row. A mean
    is over all pairs, those of a row with itself as well. With w the mean squared distance of two of the N + M rows, a
    constant, at least 1e-12,

        k(a, b) = mean over the factors f of exp(-|a - b|^2 / (f w))
    """
    rows = torch.cat([first, second])
    # By differences: by products, equal rows would get distances that are not 0.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    num_pairs = max(1, len(rows) * (len(rows) - 1))
    width = (distances.detach().sum() / num_pairs).clamp(min=1e-12)
    kernel = torch.stack([(-distances / (factor * width)).exp() for factor in width_factors]).mean(0)
    first_mask, second_mask = (one_hot_mask(ids, num_clusters).to(rows) for ids in (first_clusters, second_clusters))
    first_counts, second_counts = first_mask.sum(0), second_mask.sum(0)
    first_shares, second_shares = first_mask / first_counts.clamp(min=1), second_mask / second_counts.clamp(min=1)
    n = len(first)
    within_first = (first_shares * (kernel[:n, :n] @ first_shares)).sum(0)
    within_second = (second_shares * (kernel[n:, n:] @ second_shares)).sum(0)
    between = first_shares.T @ kernel[:n, n:] @ second_shares
    counts_pair = (first_counts > 0).unsqueeze(1) & (second_counts > 0)
    return within_first.unsqueeze(1) + within_second - 2 * between, counts_pair, width


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean, a scalar, of the values for which the mask, of their shape, holds; 0 if there are none."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
