"""k-means with greedy k-means++ seeding and restarts, by cosine or Euclidean distance.

Lloyd (1982), "Least squares quantization in PCM"; Arthur and Vassilvitskii (2007), "k-means++", in its greedy form.
The cosine form is the E-step of ProPos (arXiv 2111.11821).

cosine
    Distance 1 - cos(x, c). Centroids are plain means of unit rows; only the distance normalises them. A cluster
    without rows becomes the zero vector, at distance exactly 1 from every row.
euclidean
    Distance |x - c|^2. A cluster without rows moves to the row farthest from its own centroid (the next such cluster to
    the second farthest, ...), or stays where it was when no row is off its centroid.

The inertia is the sum of the rows' distances to their own centroids. All restarts advance side by side, a chunk of rows
at a time, yet the outcome of each is the same whichever others are run: restarts can be dealt over processes.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepclust.engine.progress import track
from deepclust.engine.randomness import generator
from deepclust.errors import InputError
from deepclust.nn.one_hot import one_hot_mask

Metric = Literal["cosine", "euclidean"]


@dataclass(frozen=True)
class KMeansResult:
    """The best state over all iterations of one or more restarts."""

    centroids: Tensor  # (K, D)
    assignments: Tensor  # (M,) int64: the nearest of these centroids
    inertia: float
    iterations: int  # that its restart ran
    restart: int


def kmeans(
    features: Tensor,
    *,
    num_clusters: int,
    metric: Metric,
    restarts: Sequence[int],
    max_iterations: int,
    tolerance: float,
    key: Sequence[int | str],
) -> KMeansResult:
    """Cluster the rows of `features` (M, D) into K; return the best state over all iterations of all `restarts`.

    Restart r draws from the stream (*key, "restart", r): `best_of` several calls with some of the restarts each is the
    result of one call with all. A restart stops when the assignments repeat, or when the distances between old and new
    centroids sum to at most `tolerance` times the mean over the D columns of their unbiased variance.
    """
    if not 1 <= num_clusters <= len(features):
        raise InputError(
            f"k-means was asked for {num_clusters} clusters of {len(features)} rows",
            expected="at least 1 cluster and a row for each",
            do="change the number of clusters",
        )
    first, uniforms = [], []
    for restart in restarts:
        draws = generator(*key, "restart", restart)
        first.append(torch.randint(len(features), (), generator=draws))
        shape = num_clusters - 1, 2 + int(math.log(num_clusters))
        uniforms.append(torch.rand(shape, dtype=torch.float64, generator=draws))
    with exact_products(features.device):
        data = _Data(features, metric)
        seeds = _seed(data, torch.stack(first), torch.stack(uniforms))
        return best_of(_lloyd(data, data.rows[seeds], list(restarts), max_iterations, tolerance))


def best_of(results: Iterable[KMeansResult]) -> KMeansResult:
    """The result of least inertia; among equals the one of the lowest restart."""
    return min(results, key=lambda result: (result.inertia, result.restart))


def lloyd(
    features: Tensor, centroids: Tensor, *, metric: Metric, max_iterations: int, tolerance: float
) -> KMeansResult:
    """The best state that k-means on `features` (M, D) reaches from the given `centroids` (K, D)."""
    with exact_products(features.device):
        data = _Data(features, metric)
        return _lloyd(data, data.localise(centroids)[None], [0], max_iterations, tolerance)[0]


def seed_kmeans_plus_plus(features: Tensor, first: Tensor, uniforms: Tensor, *, metric: Metric) -> Tensor:
    """Rows of `features` (M, D) from which R restarts begin, (R, K), by greedy k-means++ with the given random numbers.

    `first` (R,) is the first row of each restart. `uniforms` (R, K-1, T) in [0, 1) picks T candidates for each further
    one, with probabilities in proportion to the distance from the nearest row chosen so far: the first row at which the
    running sum reaches the uniform number times the total. The candidate that leaves the least total is chosen, of
    equal ones the first.
    """
    with exact_products(features.device):
        return _seed(_Data(features, metric), first, uniforms)


def nearest(features: Tensor, centroids: Tensor, *, metric: Metric) -> tuple[Tensor, Tensor]:
    """The nearest of `centroids` (K, D) to each row of `features` (M, D), lowest id on ties: ids and distances (M,)."""
    with exact_products(features.device):
        data = _Data(features, metric)
        local = data.localise(centroids)
        assignments = _assign(data, *data.linear(local[None]))[0]
        return assignments, _own_distances(data, local, assignments)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """No gradients, autocast, TF32 or bfloat16 products inside: with them, rows near a border change sides."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def require_finite(features: Tensor) -> None:
    """Raise InputError, naming rows, unless every row of `features` (M, D) has a finite length."""
    lengths = features.norm(dim=1, dtype=torch.promote_types(features.dtype, torch.float32))
    bad = (~lengths.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        named = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise InputError(
            f"NaN, infinity or overflow in {len(bad)} of {len(features)} feature rows ({named})",
            expected="finite features",
            do="look at the losses that led to them",
        )


def _converted(device: torch.device) -> int:
    """Rows turned into float64 at a time: what stays in a core's cache, what fills a GPU."""
    return 2**10 if device.type == "cpu" else 2**16


class _Data:
    """Rows (M, D) as the distance wants them, unit or about their mean, with what every restart needs of them.

    With the weights w and biases b of `linear`, row i has distance offset_i - slope (x_i . w_k + b_k) from centroid k.
    """

    def __init__(self, features: Tensor, metric: Metric) -> None:
        if metric not in get_args(Metric):
            raise InputError(f"k-means has no metric {metric!r}", expected=" or ".join(get_args(Metric)), do="name one")
        require_finite(features)
        self.cosine = metric == "cosine"
        self.slope = 1.0 if self.cosine else 2.0
        rows = features if features.dtype in (torch.float32, torch.float64) else features.float()
        # Far from the origin |x|^2 - 2 x.c + |c|^2 would lose the digits that tell the clusters apart.
        self.origin = rows.new_zeros(rows.shape[1]) if self.cosine else _mean(rows).to(rows)
        self.rows = normalize(rows, dim=1) if self.cosine else rows - self.origin
        lengths = torch.cat([chunk.double().norm(dim=1) for chunk in self.rows.split(_converted(rows.device))])
        squares = lengths.square()
        self.lengths = lengths.to(rows)
        self.offsets = torch.ones_like(self.lengths) if self.cosine else squares.to(rows)
        # A unit row is one up to rounding: with its true length, identical rows have inertia zero.
        self.total = torch.where(lengths > 0, lengths, 1).sum() if self.cosine else squares.sum()
        spread = squares.sum() - len(rows) * _mean(self.rows).square().sum()
        self.variance = float(spread) / (max(len(rows) - 1, 1) * rows.shape[1])

    def localise(self, centroids: Tensor) -> Tensor:
        return centroids.to(self.rows) - self.origin

    def linear(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (..., K, D) and biases (..., K, 1) of centroids (..., K, D), in float64."""
        weights = centroids.double()
        if self.cosine:
            return normalize(weights, dim=-1), torch.zeros_like(weights[..., :1])
        return weights, weights.square().sum(-1, keepdim=True) / -2

    def parts(self, products: int) -> list[slice]:
        """Chunks of rows, of which each takes part in so many products."""
        elements = 2**19 if self.rows.device.type == "cpu" else 2**25  # what a core's cache holds; what fills a GPU
        size = max(elements // max(products, self.rows.shape[1]), 256)
        return [slice(start, start + size) for start in range(0, len(self.rows), size)]

    def scores(self, weights: Tensor, biases: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """x.w + b of weights (n, D) and one chunk of m rows after another, (n, m): the larger, the nearer."""
        weights, biases = weights.to(self.rows), biases.to(self.rows)
        parts = self.parts(len(weights))
        buffer = weights.new_empty(len(weights), min(parts[0].stop, len(self.rows)))
        for part in parts:
            chunk = self.rows[part].T
            yield part, torch.addmm(biases, weights, chunk, out=buffer[:, : chunk.shape[1]])


def _mean(rows: Tensor) -> Tensor:
    return torch.stack([chunk.double().sum(0) for chunk in rows.split(_converted(rows.device))]).sum(0) / len(rows)


def _seed(data: _Data, first: Tensor, uniforms: Tensor) -> Tensor:
    uniforms = uniforms.to(data.rows.device, torch.float64)
    every = torch.arange(len(uniforms), device=data.rows.device)
    candidates = first.to(data.rows.device)[:, None]
    potential = data.rows.new_full((len(uniforms), len(data.rows)), math.inf)
    chosen: list[Tensor] = []
    digits = 8 * torch.finfo(data.rows.dtype).eps
    rounding = digits * data.offsets.double().norm()  # of a sum of distances, however small: each is a difference
    for _ in track(range(uniforms.shape[1] + 1), "k-means, centroids to begin with"):
        left = potential.new_empty(*candidates.shape, len(data.rows))
        totals = torch.zeros_like(candidates, dtype=torch.float64)
        weights, biases = (part.to(data.rows) for part in data.linear(data.rows[candidates]))
        for part in data.parts(candidates.shape[1]):
            # A product for each restart: in a common one, the last bits would depend on what other restarts there are.
            # With so few columns, rows from the left are twice as fast as rows from the right.
            scores = torch.stack([(data.rows[part] @ own.T).T for own in weights])
            distances = scores.add_(biases).mul_(-data.slope).add_(data.offsets[part]).clamp_(min=0)
            left[..., part] = distances = distances.minimum(potential[:, None, part])
            totals += distances.sum(-1)
        # Two candidates that are nearest to each other, and to nothing else, leave the same total: not a rounding error
        # is to choose between them.
        equal = totals <= totals.amin(1, keepdim=True) * (1 + digits) + rounding
        best = equal.int().argmax(1)
        chosen.append(candidates[every, best])
        if len(chosen) > uniforms.shape[1]:
            break
        potential = left[every, best]
        potential[every, chosen[-1]] = 0  # not a rounding error, by which the row could be drawn again
        sums = potential.cumsum(1, dtype=torch.float64)
        candidates = torch.searchsorted(sums, uniforms[:, len(chosen) - 1] * sums[:, -1:])
        candidates.clamp_(max=len(data.rows) - 1)
    return torch.stack(chosen, 1)


def _lloyd(
    data: _Data, centroids: Tensor, restarts: list[int], max_iterations: int, tolerance: float
) -> list[KMeansResult]:
    """The best state of each of R restarts that begin at centroids (R, K, D), in any order."""
    weights, biases = data.linear(centroids)
    assignments = _assign(data, weights, biases)
    sums, counts = _sums(data, assignments, centroids.shape[1])
    held = torch.tensor(restarts, device=sums.device)  # in the first dimension of all that follows
    going, iterations = torch.ones_like(held, dtype=torch.bool), torch.zeros_like(held)
    best_inertia = torch.full_like(sums[:, 0, 0], math.inf)
    best_centroids, best_assignments = centroids, assignments

    def results(which: Tensor) -> list[KMeansResult]:
        # Restarts that end in the same partition differ by rounding errors: as float32 they tie, and the lowest wins.
        columns = best_inertia[which].float().tolist(), iterations[which].tolist(), held[which].tolist()
        rows = zip(best_centroids[which] + data.origin, best_assignments[which], *columns, strict=True)
        return [KMeansResult(*row) for row in rows]

    ended = []
    for _ in track(range(max_iterations), f"k-means, {max_iterations} iterations at most"):
        centroids = _means(data, sums, counts, centroids, assignments)
        old_weights, (weights, biases) = weights, data.linear(centroids)
        renewed = _assign(data, weights, biases)
        moved = renewed != assignments
        if data.cosine:
            shift = (1 - (old_weights * weights).sum(2)).sum(1)
        else:
            shift = (old_weights - weights).square().sum((1, 2))
        go_on = going & moved.any(1) & (shift > tolerance * data.variance)
        num_moved, left = torch.stack([moved.sum(), go_on.sum()]).tolist()  # at once: a GPU is waited for
        if sums.is_cpu or num_moved < moved.numel() / 32:
            _move(data, sums, counts, moved, assignments, renewed)
        else:
            sums, counts = _sums(data, renewed, centroids.shape[1])
        assignments = renewed

        # Summed over the rows of a cluster, offset - slope (x . w + b) needs no more than the sum of the rows.
        inertia = data.total - data.slope * ((sums * weights).sum(2) + counts * biases[..., 0]).sum(1)
        inertia.clamp_(min=0)
        better = going & (inertia < best_inertia)
        best_inertia = inertia.where(better, best_inertia)
        best_centroids = centroids.where(better[:, None, None], best_centroids)
        best_assignments = assignments.where(better[:, None], best_assignments)
        iterations = iterations + going

        going = go_on
        # On a GPU those that have ended are taken along for a while: to sort them out takes longer.
        if left <= (len(held) - 1 if sums.is_cpu else len(held) // 2):
            ended += results(~going)
            kept = going.nonzero()[:, 0]
            held, going, iterations, best_inertia, best_centroids, best_assignments = (
                state[kept] for state in (held, going, iterations, best_inertia, best_centroids, best_assignments)
            )
            centroids, weights, assignments, sums, counts = (
                state[kept] for state in (centroids, weights, assignments, sums, counts)
            )
        if left == 0:
            break
    return ended + results(torch.ones_like(going))


def _assign(data: _Data, weights: Tensor, biases: Tensor) -> Tensor:
    """The nearest to each row of the centroids with weights (R, K, D) and biases (R, K, 1), (R, M).

    Where the products leave doubt, float64 decides, and where that leaves doubt, the lowest id is taken: assignments
    depend neither on the shapes of the products nor on the number of threads nor on the device.
    """
    num_restarts, num_clusters, num_features = weights.shape
    longest = weights.norm(dim=2).amax(1)[:, None].to(data.rows)
    equal = 1e-12  # twice what float64 may be off by, in units of |x||w| + |w|^2; `close` is the same for the products
    close = equal + 2 * num_features**0.5 * torch.finfo(data.rows.dtype).eps
    ids = torch.arange(num_clusters, device=weights.device)[:, None]
    codes = (2**23 + ids).T.to(data.rows)
    assignments = torch.empty(num_restarts, len(data.rows), dtype=torch.int64, device=weights.device)
    doubtful = torch.empty_like(assignments, dtype=torch.bool)
    for part, products in data.scores(weights.flatten(0, 1), biases.flatten(0, 1)):
        scores = products.view(num_restarts, num_clusters, -1)
        margin = close * (data.lengths[part] * longest + longest.square())
        # Ones and zeros as numbers, times 2^23 + id: several times faster than an arg-max, and exact.
        nearby = torch.ge(scores, (scores.amax(1) - margin)[:, None], out=torch.empty_like(scores))
        found = (codes @ nearby)[:, 0]
        assignments[:, part] = found - 2**23
        doubtful[:, part] = found >= 2**24
    for part in _together(weights):
        own, its_weights = assignments[part], weights[part]
        for which, rows in _pairs(doubtful[part], _converted(weights.device) // len(own)):
            products = (its_weights.flatten(0, 1) @ data.rows[rows].double().T).view(len(own), num_clusters, -1)
            scores = products[which, :, torch.arange(len(rows), device=rows.device)] + biases[part][which, :, 0]
            long = longest[part][which, 0]
            ties = scores >= (scores.amax(1) - equal * (data.lengths[rows] * long + long.square()))[:, None]
            own[which, rows] = torch.where(ties, ids.T, num_clusters).amin(1)
    return assignments


def _together(restarts: Tensor) -> list[slice]:
    """Which of the restarts (R, ...) are worked on at a time: each alone in a core's cache, all of them on a GPU, which
    has to be waited for wherever it is asked how many rows there are."""
    step = 1 if restarts.is_cpu else len(restarts)
    return [slice(start, start + step) for start in range(0, len(restarts), step)]


def _pairs(chosen: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The restarts and the rows where `chosen` (R, M) holds, at most `size` of them at a time."""
    found = chosen.flatten().nonzero()[:, 0]
    for some in found.split(size) if len(found) else ():
        yield some // chosen.shape[1], some % chosen.shape[1]


def _sums(data: _Data, assignments: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Sums (R, K, D), in float64, and numbers (R, K) of the rows of each cluster, of assignments (R, M)."""
    if not data.rows.is_cpu:
        return _sums_by_products(data, assignments, num_clusters)
    shape = len(assignments), num_clusters, data.rows.shape[1]
    sums = torch.zeros(shape, dtype=torch.float64, device=data.rows.device)
    step = _converted(sums.device)
    for rows, to in zip(data.rows.split(step), assignments.split(step, 1), strict=True):
        values = rows.double()
        for own, its in zip(sums, to, strict=True):
            own.index_add_(0, its, values)
    return sums, torch.stack([own.bincount(minlength=num_clusters) for own in assignments])


def _sums_by_products(data: _Data, assignments: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """The same for a GPU, where additions to few rows would wait for one another, in an order that chance decides."""
    shape = len(assignments), num_clusters, data.rows.shape[1]
    sums = torch.zeros(shape, dtype=torch.float64, device=data.rows.device)
    counts = torch.zeros(shape[:2], dtype=torch.int64, device=data.rows.device)
    for part in data.parts(len(assignments) * num_clusters):
        members = one_hot_mask(assignments[:, part], num_clusters).mT  # (R, K, m)
        sums += members.double() @ data.rows[part].double()
        counts += members.sum(2)
    return sums, counts


def _move(data: _Data, sums: Tensor, counts: Tensor, moved: Tensor, origin: Tensor, to: Tensor) -> None:
    """Bring sums (R, K, D) and counts (R, K) up to date with the rows that `moved` (R, M) from `origin` to `to` (R, M).

    In float64 a row that leaves takes away what it brought, up to a rounding error that no centroid shows.
    """
    num_clusters = counts.shape[1]
    for part in _together(sums):
        own, count = sums[part].view(-1, sums.shape[2]), counts[part].view(-1)
        for which, rows in _pairs(moved[part], _converted(sums.device)):
            values = data.rows.index_select(0, rows).double()
            for places, sign in (to, 1), (origin, -1):
                place = which * num_clusters + places[part][which, rows]
                own.index_add_(0, place, values, alpha=sign)
                count.index_add_(0, place, torch.ones_like(place), alpha=sign)


def _means(data: _Data, sums: Tensor, counts: Tensor, old: Tensor, assignments: Tensor) -> Tensor:
    """The next centroids (R, K, D), those of empty clusters by the rule of the distance."""
    held = (counts > 0)[..., None]
    means = (sums / counts[..., None]).to(old).where(held, 0 if data.cosine else old)
    if not data.cosine:
        for restart in (~held).any(1)[:, 0].nonzero()[:, 0].tolist():
            distances = _own_distances(data, means[restart], assignments[restart])
            empty = (counts[restart] == 0).nonzero()[:, 0]
            far = distances.argsort(descending=True, stable=True)[: len(empty)]
            far = far[distances[far] > 0]
            means[restart, empty[: len(far)]] = data.rows[far]
    return means


def _own_distances(data: _Data, centroids: Tensor, assignments: Tensor) -> Tensor:
    """Distance (M,) of each row to its own of centroids (K, D), exact where the row lies on it."""
    weights, _ = data.linear(centroids)
    distances = []
    step = _converted(data.rows.device)
    for rows, own in zip(data.rows.split(step), assignments.split(step), strict=True):
        if data.cosine:
            distances.append((1 - (rows * weights[own]).sum(1)).clamp_(min=0))
        else:
            distances.append((rows - weights[own]).square().sum(1))
    return torch.cat(distances).to(data.rows)
