"""Greedy k-means++ seeding: the rows from which k-means starts.

Arthur and Vassilvitskii (2007), "k-means++: the advantages of careful seeding", in the greedy form that draws several
candidates for each seed and keeps the best of them.
"""

import math

import torch
from torch import Tensor

from deepclust.clustering.exact_products import exact_products
from deepclust.clustering.kmeans_distances import KMeansData, Metric
from deepclust.engine.progress_bar import track


def seed_kmeans_plus_plus(features: Tensor, first_seeds: Tensor, uniforms: Tensor, *, metric: Metric) -> Tensor:
    """Return the rows of `features` (M, D) from which R restarts begin, indices (R, K), by greedy k-means++.

    `first_seeds` (R,) are the first seed of each restart. `uniforms` (R, K-1, T) are random numbers in [0, 1), of which
    each picks one of T candidates for a further seed: the first row at which the running sum of the distances from the
    nearest seed so far reaches the number times the total. So a row is picked with a probability in proportion to its
    distance. The candidate that leaves the smallest total distance is the next seed, on ties the first.
    """
    with exact_products(features.device):
        return choose_seeds(KMeansData(features, metric), first_seeds, uniforms)


def choose_seeds(data: KMeansData, first_seeds: Tensor, uniforms: Tensor) -> Tensor:
    """Do what `seed_kmeans_plus_plus` does, on features that are prepared already."""
    uniforms = uniforms.to(data.rows.device, torch.float64)
    num_restarts, num_further_seeds, _ = uniforms.shape
    restarts = torch.arange(num_restarts, device=data.rows.device)
    candidates = first_seeds.to(data.rows.device)[:, None]
    seed_distances = data.rows.new_full((num_restarts, len(data.rows)), math.inf)  # from the nearest seed so far
    # One tensor: many small ones, each made between large ones, would keep the system from taking those back.
    seeds = candidates.new_empty(num_restarts, num_further_seeds + 1)
    relative_error = 8 * torch.finfo(data.rows.dtype).eps
    # The rounding error of a sum of distances. It does not shrink with the sum, as each distance is a difference.
    absolute_error = relative_error * data.offsets.double().norm()
    for position in track(range(num_further_seeds + 1), "k-means++ seeding"):
        candidate_distances = seed_distances.new_empty(*candidates.shape, len(data.rows))
        totals = torch.zeros_like(candidates, dtype=torch.float64)
        weights, biases = (part.to(data.rows) for part in data.linear_form(data.rows[candidates]))
        for chunk in data.chunks(candidates.shape[1]):
            # Each restart has a product of its own: in a common one, the last bits would depend on which other
            # restarts there are. With so few columns, rows from the left are twice as fast as rows from the right.
            scores = torch.stack([(data.rows[chunk] @ own.T).T for own in weights])
            distances = scores.add_(biases).mul_(-data.slope).add_(data.offsets[chunk]).clamp_(min=0)
            candidate_distances[..., chunk] = distances = distances.minimum(seed_distances[:, None, chunk])
            totals += distances.sum(-1)
        # Two candidates that are nearest to each other, and to nothing else, leave the same total. Such ties are found
        # with a tolerance, so that no rounding error chooses between the two.
        is_best = totals <= totals.amin(1, keepdim=True) * (1 + relative_error) + absolute_error
        best = is_best.int().argmax(1)
        seeds[:, position] = candidates[restarts, best]
        if position == num_further_seeds:
            break
        seed_distances = candidate_distances[restarts, best]
        # A rounding error above 0 would let the same row be drawn again.
        seed_distances[restarts, seeds[:, position]] = 0
        running_sums = seed_distances.cumsum(1, dtype=torch.float64)
        candidates = torch.searchsorted(running_sums, uniforms[:, position] * running_sums[:, -1:])
        candidates.clamp_(max=len(data.rows) - 1)
    return seeds
