"""k-means by Lloyd's iterations, with restarts that all advance at once.

Lloyd (1982), "Least squares quantization in PCM". The cosine form is the E-step of ProPos (arXiv 2111.11821). The steps
live in files of their own:

kmeans_seeding         where each restart begins (greedy k-means++)
kmeans_distances       the nearest centroid of each row
kmeans_empty_clusters  what happens to clusters without rows
distributed_kmeans     restarts shared out over several processes

cosine
    The distance is 1 - cos(x, c). Centroids are plain means of unit rows; only the distance normalises them.
euclidean
    The distance is |x - c|^2.

The inertia is the sum of the rows' distances to their own centroids. Although all restarts advance at once, a chunk of
rows at a time, the outcome of each is the same whichever others run with it. So they can be shared out over processes.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepclust.clustering.backend import current_settings, takes_faiss
from deepclust.clustering.exact_products import exact_products
from deepclust.clustering.kmeans_distances import KMeansData, Metric, assign_rows, float64_chunk_size, restart_row_pairs
from deepclust.clustering.kmeans_empty_clusters import relocate_empty_clusters
from deepclust.clustering.kmeans_seeding import choose_seeds
from deepclust.clustering.unit_rows import draw_rows
from deepclust.engine.progress_bar import track
from deepclust.engine.randomness import make_generator
from deepclust.errors import InputError
from deepclust.nn.one_hot import one_hot_mask

log = logging.getLogger(__name__)

BLOCK_ROWS = 8192  # on which both libraries are timed
MAX_ROUNDING = 1e-5  # of centroids, in standard deviations of the rows; below it no row is assigned anew


@dataclass(frozen=True)
class KMeansResult:
    """The state of least inertia over all iterations of one or more restarts."""

    centroids: Tensor  # (K, D)
    assignments: Tensor  # (M,) int64: the nearest of these centroids
    inertia: float
    iterations: int  # how many its restart ran
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
    """Cluster the rows of `features` (M, D) into K clusters; return the best state over all iterations and `restarts`.

    Restart r draws its random numbers from the stream (*key, "restart", r). So `best_result` of several calls, each
    with some of the restarts, equals the result of one call with all of them. A restart stops when the assignments
    repeat, or when the distances between old and new centroids sum to at most `tolerance` times the mean over the D
    columns of their unbiased variance.

    Raises:
        InputError: for fewer rows than clusters, an unknown metric, or rows that are not finite.
    """
    if not 1 <= num_clusters <= len(features):
        raise InputError(
            f"k-means was asked for {num_clusters} clusters of {len(features)} rows",
            expected="at least 1 cluster and a row for each",
            do="change the number of clusters",
        )
    num_seeding_rows = current_settings().num_seeding_rows(len(features), num_clusters)
    first_seeds, uniforms = [], []
    for restart in restarts:
        generator = make_generator(*key, "restart", restart)
        first_seeds.append(torch.randint(num_seeding_rows, (), generator=generator))
        shape = num_clusters - 1, 2 + int(math.log(num_clusters))
        uniforms.append(torch.rand(shape, dtype=torch.float64, generator=generator))
    with exact_products(features.device):
        data = KMeansData(features, metric)
        if num_seeding_rows < len(features):
            drawn = torch.from_numpy(draw_rows(len(features), num_seeding_rows, *key, "seeding")).to(features.device)
            log.info("k-means++ chooses among %s of %s rows", f"{num_seeding_rows:,}", f"{len(features):,}")
            sample = KMeansData(features[drawn], metric)
            seeds = drawn[choose_seeds(sample, torch.stack(first_seeds), torch.stack(uniforms))]
        else:
            seeds = choose_seeds(data, torch.stack(first_seeds), torch.stack(uniforms))
        results = _run_lloyd(data, data.rows[seeds], list(restarts), max_iterations, tolerance)
        return _assign_to_rounded_centroids(data, best_result(results))


def best_result(results: Iterable[KMeansResult]) -> KMeansResult:
    """Return the result of least inertia, on ties that of the lowest restart."""
    return min(results, key=lambda result: (result.inertia, result.restart))


def kmeans_from_centroids(
    features: Tensor, centroids: Tensor, *, metric: Metric, max_iterations: int, tolerance: float
) -> KMeansResult:
    """Return the best state that k-means on `features` (M, D) reaches from the given `centroids` (K, D)."""
    with exact_products(features.device):
        data = KMeansData(features, metric)
        result = _run_lloyd(data, data.subtract_origin(centroids)[None], [0], max_iterations, tolerance)[0]
        return _assign_to_rounded_centroids(data, result)


def _assign_to_rounded_centroids(data: KMeansData, result: KMeansResult) -> KMeansResult:
    """Return a result whose assignments are the nearest of its centroids, also far from the origin.

    The iterations measure from the mean of the rows. So far away that the coordinates of the rows themselves have few
    digits left for the differences between rows, the returned centroids are those of the iterations rounded.
    """
    rounding = torch.finfo(data.rows.dtype).eps * float(data.origin.abs().max())
    if rounding <= MAX_ROUNDING * math.sqrt(max(data.mean_variance, 0)):
        return result
    centroids = data.subtract_origin(result.centroids)
    return replace(result, assignments=assign_rows(data, *data.linear_form(centroids[None]))[0])


def _run_lloyd(
    data: KMeansData, centroids: Tensor, restarts: list[int], max_iterations: int, tolerance: float
) -> list[KMeansResult]:
    """Return the best state of each of R restarts that begin at centroids (R, K, D), in the order in which they end."""
    weights, biases = data.linear_form(centroids)
    with_faiss = _takes_faiss(data, weights, biases)
    assignments = _assign_rows(data, weights, biases, with_faiss)
    sums, counts = _sum_clusters(data, assignments, centroids.shape[1])
    # The first dimension of all that follows is the restarts that are still carried along.
    restart_ids = torch.tensor(restarts, device=sums.device)
    is_running, iterations = torch.ones_like(restart_ids, dtype=torch.bool), torch.zeros_like(restart_ids)
    best_inertia = torch.full_like(sums[:, 0, 0], math.inf)
    best_centroids, best_assignments = centroids, assignments

    def make_results(mask: Tensor) -> list[KMeansResult]:
        # Restarts that end in the same partition differ by rounding errors: as float32 they tie, and the lowest wins.
        columns = best_inertia[mask].float().tolist(), iterations[mask].tolist(), restart_ids[mask].tolist()
        rows = zip(best_centroids[mask] + data.origin, best_assignments[mask], *columns, strict=True)
        return [KMeansResult(*row) for row in rows]

    finished = []
    for _ in track(range(max_iterations), f"k-means (at most {max_iterations} iterations)"):
        centroids = _compute_centroids(data, sums, counts, centroids, assignments)
        old_weights, (weights, biases) = weights, data.linear_form(centroids)
        new_assignments = _assign_rows(data, weights, biases, with_faiss)
        has_moved = new_assignments != assignments
        if data.is_cosine:
            shift = (1 - (old_weights * weights).sum(2)).sum(1)
        else:
            shift = (old_weights - weights).square().sum((1, 2))
        runs_on = is_running & has_moved.any(1) & (shift > tolerance * data.mean_variance)
        # Both numbers are fetched at once, because the host waits for a GPU here.
        num_moved, num_running = torch.stack([has_moved.sum(), runs_on.sum()]).tolist()
        if sums.is_cpu or num_moved < has_moved.numel() / 32:
            _update_cluster_sums(data, sums, counts, has_moved, assignments, new_assignments)
        else:
            sums, counts = _sum_clusters(data, new_assignments, centroids.shape[1])
        assignments = new_assignments

        # Summed over the rows of a cluster, offset - slope (x . w + b) needs no more than the sum of the rows.
        inertia = data.offset_sum - data.slope * ((sums * weights).sum(2) + counts * biases[..., 0]).sum(1)
        inertia.clamp_(min=0)
        is_better = is_running & (inertia < best_inertia)
        best_inertia = inertia.where(is_better, best_inertia)
        best_centroids = centroids.where(is_better[:, None, None], best_centroids)
        best_assignments = assignments.where(is_better[:, None], best_assignments)
        iterations = iterations + is_running

        is_running = runs_on
        # On a GPU, restarts that have ended are carried along for a while: to take them out costs more.
        if num_running <= (len(restart_ids) - 1 if sums.is_cpu else len(restart_ids) // 2):
            finished += make_results(~is_running)
            running = is_running.nonzero()[:, 0]
            restart_ids, is_running, iterations = restart_ids[running], is_running[running], iterations[running]
            best_inertia, best_centroids, best_assignments = (
                state[running] for state in (best_inertia, best_centroids, best_assignments)
            )
            centroids, weights, assignments, sums, counts = (
                state[running] for state in (centroids, weights, assignments, sums, counts)
            )
        if num_running == 0:
            break
    return finished + make_results(torch.ones_like(is_running))


def _takes_faiss(data: KMeansData, weights: Tensor, biases: Tensor) -> bool:
    """Return whether faiss is to assign the rows to K clusters of weights (R, K, D)."""

    def assign_block(with_faiss: bool) -> Tensor:
        return _assign_rows(data.first_rows(BLOCK_ROWS), weights[:1], biases[:1], with_faiss)

    return takes_faiss("k-means", len(data.rows), weights.shape[1:], assign_block, device=weights.device)


def _assign_rows(data: KMeansData, weights: Tensor, biases: Tensor, with_faiss: bool) -> Tensor:
    """Return the nearest centroid to each row, (R, M), by weights (R, K, D) and biases (R, K, 1)."""
    if not with_faiss:
        return assign_rows(data, weights, biases)
    from deepclust.clustering.faiss_search import nearest_by_faiss

    is_euclidean = not data.is_cosine  # the weights are the centroids, for the cosine those of unit length
    return torch.cat([nearest_by_faiss(data.rows, own, 1, is_euclidean=is_euclidean).T for own in weights])


def _compute_centroids(
    data: KMeansData, sums: Tensor, counts: Tensor, old_centroids: Tensor, assignments: Tensor
) -> Tensor:
    """Return the next centroids (R, K, D): the means of the clusters, and a place for those that are empty."""
    means = (sums / counts[..., None]).to(old_centroids)
    return relocate_empty_clusters(data, means, counts, old_centroids, assignments)


def _sum_clusters(data: KMeansData, assignments: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Return the sum (R, K, D) of each cluster's rows, in float64, and their number (R, K), by assignments (R, M)."""
    if not data.rows.is_cpu:
        return _sum_clusters_by_products(data, assignments, num_clusters)
    shape = len(assignments), num_clusters, data.rows.shape[1]
    sums = torch.zeros(shape, dtype=torch.float64, device=data.rows.device)
    size = float64_chunk_size(sums.device)
    for rows, chunk_assignments in zip(data.rows.split(size), assignments.split(size, 1), strict=True):
        values = rows.double()
        for restart_sums, restart_assignments in zip(sums, chunk_assignments, strict=True):
            restart_sums.index_add_(0, restart_assignments, values)
    return sums, torch.stack([one_restart.bincount(minlength=num_clusters) for one_restart in assignments])


def _sum_clusters_by_products(data: KMeansData, assignments: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Return the same as `_sum_clusters`, by matrix products.

    On a GPU, additions to few rows would wait for one another, in an order that differs from run to run.
    """
    shape = len(assignments), num_clusters, data.rows.shape[1]
    sums = torch.zeros(shape, dtype=torch.float64, device=data.rows.device)
    counts = torch.zeros(shape[:2], dtype=torch.int64, device=data.rows.device)
    for chunk in data.chunks(len(assignments) * num_clusters):
        is_member = one_hot_mask(assignments[:, chunk], num_clusters).mT  # (R, K, m)
        sums += is_member.double() @ data.rows[chunk].double()
        counts += is_member.sum(2)
    return sums, counts


def _update_cluster_sums(
    data: KMeansData, sums: Tensor, counts: Tensor, has_moved: Tensor, old_assignments: Tensor, new_assignments: Tensor
) -> None:
    """Update sums (R, K, D) and counts (R, K) in place for the rows of `has_moved` (R, M), which changed their cluster.

    In float64 a row that leaves takes away what it brought, up to a rounding error that no centroid shows.
    """
    num_clusters = counts.shape[1]
    for group in data.restart_groups(len(sums)):
        flat_sums, flat_counts = sums[group].view(-1, sums.shape[2]), counts[group].view(-1)
        for restarts, rows in restart_row_pairs(has_moved[group], float64_chunk_size(sums.device)):
            values = data.rows.index_select(0, rows).double()
            for assignments, sign in (new_assignments, 1), (old_assignments, -1):
                clusters = restarts * num_clusters + assignments[group][restarts, rows]
                flat_sums.index_add_(0, clusters, values, alpha=sign)
                flat_counts.index_add_(0, clusters, torch.ones_like(clusters), alpha=sign)
