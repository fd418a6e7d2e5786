"""Distances between rows and centroids, cosine or Euclidean, and how k-means assigns rows to the nearest centroid."""

import copy
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepclust.clustering.exact_products import exact_products, require_finite
from deepclust.errors import InputError

Metric = Literal["cosine", "euclidean"]
MANY_CLUSTERS = 64  # from so many on, the scores of a row lie side by side
FLOAT64_ERROR = 1e-12  # differences of scores or distances up to this share of the largest ones count as none


def nearest_centroids(features: Tensor, centroids: Tensor, *, metric: Metric) -> tuple[Tensor, Tensor]:
    """Return the nearest of `centroids` (K, D) to each row of `features` (M, D): assignments (M,) and distances (M,).

    Among equally near centroids the lowest id wins.
    """
    with exact_products(features.device):
        data = KMeansData(features, metric)
        centroids = data.subtract_origin(centroids)
        assignments = assign_rows(data, *data.linear_form(centroids[None]))[0]
        return assignments, distances_to_own_centroids(data, centroids, assignments)


def squared_distances(rows: Tensor, centroids: Tensor) -> Tensor:
    """Return the squared Euclidean distances (N, K) of rows (N, D) to centroids (K, D), from their differences.

    By a product, as torch.cdist takes it for more than 25 rows, |x|^2 - 2 x.c + |c|^2 has no digits left that tell
    centroids apart which lie close together and far from the origin.
    """
    return torch.cdist(rows, centroids, compute_mode="donot_use_mm_for_euclid_dist").square()


def centroid_logits(features: Tensor, centroids: Tensor, *, metric: Metric) -> Tensor:
    """Return minus the distances (N, K) of features (N, D) to centroids (K, D), squared Euclidean or cosine.

    The first largest logit of a row is its nearest centroid, as k-means itself decides. For that, the distances are
    computed in float64, those that are equal up to rounding errors are made equal, and the smallest one of each row is
    subtracted before they are rounded to the type of the features. A softmax does not notice it. It is the one rule of
    evaluation, prediction and exported programs.
    """
    if metric == "cosine":  # rounded to unit length, as `KMeansData` has the rows
        distances = 1 - normalize(features, dim=1).double() @ normalize(centroids.double(), dim=1).T
        largest = torch.full_like(distances[:, :1], 2)
    else:
        distances = squared_distances(features.double(), centroids.double())
        largest = distances.amax(1, keepdim=True)
    gaps = distances - distances.amin(1, keepdim=True)
    return -gaps.masked_fill(gaps <= FLOAT64_ERROR * largest, 0).to(features.dtype)


class KMeansData:
    """Features (M, D) in the form that k-means computes with, and the quantities that all restarts share.

    For the cosine distance the rows have unit length; for the Euclidean distance their mean is subtracted. With the
    weights w and biases b of `linear_form`, row i has the distance offset_i - slope (x_i . w_k + b_k) from centroid k.
    """

    def __init__(self, features: Tensor, metric: Metric) -> None:
        if metric not in get_args(Metric):
            raise InputError(f"k-means has no metric {metric!r}", expected=" or ".join(get_args(Metric)), do="name one")
        require_finite(features)
        self.is_cosine = metric == "cosine"
        self.slope = 1.0 if self.is_cosine else 2.0
        rows = features if features.dtype in (torch.float32, torch.float64) else features.float()
        # Far from the origin |x|^2 - 2 x.c + |c|^2 would lose the digits that tell the clusters apart.
        self.origin = rows.new_zeros(rows.shape[1]) if self.is_cosine else _compute_mean(rows).to(rows)
        self.rows = normalize(rows, dim=1) if self.is_cosine else rows - self.origin
        chunks = self.rows.split(float64_chunk_size(rows.device))
        lengths = torch.cat([chunk.double().norm(dim=1) for chunk in chunks])
        squares = lengths.square()
        self.lengths = lengths.to(rows)
        self.offsets = torch.ones_like(self.lengths) if self.is_cosine else squares.to(rows)
        # A normalised row has length 1 only up to rounding. Its actual length gives identical rows an inertia of zero.
        self.offset_sum = torch.where(lengths > 0, lengths, 1).sum() if self.is_cosine else squares.sum()
        squared_deviations = squares.sum() - len(rows) * _compute_mean(self.rows).square().sum()
        self.mean_variance = float(squared_deviations) / (max(len(rows) - 1, 1) * rows.shape[1])

    def first_rows(self, num_rows: int) -> "KMeansData":
        """Return the same with the first rows only, which is enough to assign these."""
        first = copy.copy(self)
        first.rows, first.lengths, first.offsets = (part[:num_rows] for part in (self.rows, self.lengths, self.offsets))
        return first

    def subtract_origin(self, centroids: Tensor) -> Tensor:
        """Move centroids (..., D) from the coordinates of the features into those of `rows`."""
        return centroids.to(self.rows) - self.origin

    def linear_form(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights (..., K, D) and biases (..., K, 1) of centroids (..., K, D), in float64."""
        weights = centroids.double()
        if self.is_cosine:
            return normalize(weights, dim=-1), torch.zeros_like(weights[..., :1])
        return weights, weights.square().sum(-1, keepdim=True) / -2

    def chunks(self, num_products: int) -> list[slice]:
        """Split the rows into chunks, for work in which each row takes part in `num_products` products."""
        elements = 2**19 if self.rows.device.type == "cpu" else 2**25  # what a core's cache holds; what fills a GPU
        size = max(elements // max(num_products, self.rows.shape[1]), 256)
        return [slice(start, start + size) for start in range(0, len(self.rows), size)]

    def score_chunks(self, weights: Tensor, biases: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the scores x.w + b (n, m) of weights (n, D) for one chunk of m rows after another: larger is nearer.

        All chunks share one buffer, so that a chunk is valid until the next one is asked for.
        """
        weights, biases = weights.to(self.rows), biases.to(self.rows)
        chunks = self.chunks(len(weights))
        buffer = weights.new_empty(len(weights), min(chunks[0].stop, len(self.rows)))
        for chunk in chunks:
            columns = self.rows[chunk].T
            yield chunk, torch.addmm(biases, weights, columns, out=buffer[:, : columns.shape[1]])

    def long_score_chunks(self, weights: Tensor, biases: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the same scores for chunks of more rows, with those of one row side by side in memory.

        On a CPU this is faster where there are many weights.
        """
        weights, biases = weights.to(self.rows).T, biases.to(self.rows).T
        size = min(max(2**22 // weights.shape[1], 256), 1024)
        buffer = weights.new_empty(min(size, len(self.rows)), weights.shape[1])
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            yield slice(start, start + size), torch.addmm(biases, rows, weights, out=buffer[: len(rows)]).T

    def restart_groups(self, num_restarts: int) -> list[slice]:
        """Split the restarts into groups that are worked on at once: one by one on a CPU, all together on a GPU.

        One restart fits a core's cache. A GPU has to be waited for whenever the number of selected rows is asked for,
        so there it is asked once for all restarts.
        """
        size = 1 if self.rows.is_cpu else num_restarts
        return [slice(start, start + size) for start in range(0, num_restarts, size)]


def float64_chunk_size(device: torch.device) -> int:
    """Return how many rows are converted to float64 at a time: what stays in a core's cache, what fills a GPU."""
    return 2**10 if device.type == "cpu" else 2**16


def _compute_mean(rows: Tensor) -> Tensor:
    chunks = rows.split(float64_chunk_size(rows.device))
    return torch.stack([chunk.double().sum(0) for chunk in chunks]).sum(0) / len(rows)


def assign_rows(data: KMeansData, weights: Tensor, biases: Tensor) -> Tensor:
    """Return the nearest centroid to each row, assignments (R, M), by weights (R, K, D) and biases (R, K, 1).

    Scores in the precision of the rows decide where they leave no doubt, then scores in float64. Where these are equal
    up to rounding errors too, the lowest id wins. So assignments depend neither on the shapes of the products nor on
    the number of threads nor on the device.
    """
    num_restarts, num_clusters, num_features = weights.shape
    max_norms = weights.norm(dim=2).amax(1)[:, None].to(data.rows)
    # Twice the largest rounding error of a score, in units of |x||w| + |w|^2: in float64, and in the rows' precision.
    score_error = FLOAT64_ERROR + 2 * num_features**0.5 * torch.finfo(data.rows.dtype).eps
    ids = torch.arange(num_clusters, device=weights.device)[:, None]
    # The codes 2^23 + id of the centroids that may be the nearest are summed in one product: several times faster than
    # an arg-max, and exact. The sum is at least 2^24 just where there is more than one.
    codes = (2**23 + ids).T.to(data.rows)
    assignments = torch.empty(num_restarts, len(data.rows), dtype=torch.int64, device=weights.device)
    is_ambiguous = torch.empty_like(assignments, dtype=torch.bool)
    is_long = data.rows.is_cpu and num_clusters >= MANY_CLUSTERS
    score_chunks = data.long_score_chunks if is_long else data.score_chunks
    for chunk, products in score_chunks(weights.flatten(0, 1), biases.flatten(0, 1)):
        scores = products.unflatten(0, (num_restarts, num_clusters))
        margin = score_error * (data.lengths[chunk] * max_norms + max_norms.square())
        is_near = torch.ge(scores, (scores.amax(1) - margin)[:, None], out=scores)  # in place: it stays in the cache
        code_sums = (codes @ is_near)[:, 0]
        assignments[:, chunk] = code_sums - 2**23
        is_ambiguous[:, chunk] = code_sums >= 2**24
    for group in data.restart_groups(num_restarts):
        group_assignments, group_weights = assignments[group], weights[group]
        group_size = len(group_assignments)
        pairs = restart_row_pairs(is_ambiguous[group], float64_chunk_size(weights.device) // group_size)
        for restarts, rows in pairs:
            products = (group_weights.flatten(0, 1) @ data.rows[rows].double().T).view(group_size, num_clusters, -1)
            scores = products[restarts, :, torch.arange(len(rows), device=rows.device)] + biases[group][restarts, :, 0]
            norms = max_norms[group][restarts, 0]
            margin = FLOAT64_ERROR * (data.lengths[rows] * norms + norms.square())
            is_tied = scores >= (scores.amax(1) - margin)[:, None]
            group_assignments[restarts, rows] = torch.where(is_tied, ids.T, num_clusters).amin(1)
    return assignments


def restart_row_pairs(mask: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the restarts and the rows at which `mask` (R, M) is true, at most `size` pairs at a time."""
    positions = mask.flatten().nonzero()[:, 0]
    for chunk in positions.split(size) if len(positions) else ():
        yield chunk // mask.shape[1], chunk % mask.shape[1]


def distances_to_own_centroids(data: KMeansData, centroids: Tensor, assignments: Tensor) -> Tensor:
    """Return the distance (M,) of each row to its own one of `centroids` (K, D), exactly zero where the two agree."""
    weights, _ = data.linear_form(centroids)
    distances = []
    size = float64_chunk_size(data.rows.device)
    for rows, own in zip(data.rows.split(size), assignments.split(size), strict=True):
        if data.is_cosine:
            distances.append((1 - (rows * weights[own]).sum(1)).clamp_(min=0))
        else:
            distances.append((rows - weights[own]).square().sum(1))
    return torch.cat(distances).to(data.rows)
