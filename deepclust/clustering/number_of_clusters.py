"""An estimate of how many clusters features hold, from three measures that use no labels.

Each measure looks at a number K of clusters in its own way and names the K that it prefers:

silhouette  How much nearer a row is to its own cluster of k-means than to the next one (Rousseeuw 1987), the mean.
stability   How well two k-means agree whose centroids come from two random subsamples, in ARI over all rows, the mean
            over the pairs of NUM_SUBSAMPLES subsamples (von Luxburg 2010, "Clustering stability: an overview",
            section 2).
eigengap    How far the K-th smallest eigenvalue of the neighbour graph's normalised Laplacian is from the next (von
            Luxburg 2007, "A tutorial on spectral clustering", section 8.3). For K nearly separate parts, K eigenvalues
            are near 0.

Each measure prefers some K whatever the data. So its values are compared with those on a reference, one normal cloud
with the covariance of the data, as the gap statistic does (Tibshirani, Walther, Hastie 2001):

silhouette  The K whose value is the furthest above the reference.
stability   The K that closes the largest share of the gap between the reference and 1. Of nearly equal values the
            largest K is taken, because two groups of groups are as stable as the groups themselves.
eigengap    The largest gap after the first.

Where the best value is not above the measure's margin, the measure names 1. The margin of the eigengap is one and a
half times the largest gap of the reference.

The estimate is the median of the three, hence what two of them agree on, if they do. All of it is computed on a sample
of at most MAX_ROWS rows and their first MAX_COMPONENTS principal components. K is tried up to MAX_CLUSTERS, up to a
tenth of the rows, so that a cluster has ten rows on average, and up to the number of distinct rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, median

import numpy as np
import torch
from torch import Tensor

from deepclust.clustering.kmeans import KMeansResult, kmeans
from deepclust.clustering.kmeans_distances import nearest_centroids
from deepclust.clustering.neighbor_graph import build_neighbor_graph
from deepclust.engine.progress import track
from deepclust.engine.randomness import make_generator
from deepclust.errors import InputError

MAX_ROWS, MAX_COMPONENTS, MAX_CLUSTERS = 2000, 50, 50
NUM_SUBSAMPLES, SUBSAMPLE_SHARE = 4, 0.7
KMEANS_RESTARTS, KMEANS_MAX_ITERATIONS, KMEANS_TOLERANCE = 3, 50, 1e-4
NUM_NEIGHBORS = 10
ROUNDING_ERROR = 1e-6  # of features in float32, as a share of their length
MARGINS = {"silhouette": 0.05, "stability": 0.3, "eigengap": 1.5}
STABILITY_TIE = 0.02  # values of stability that differ by at most this count as equal
# The gap between the reference's stability and 1 counts at least this much: where the reference is stable itself, a
# small lead over it says little.
MIN_STABILITY_GAP = 0.5


@dataclass(frozen=True)
class ClusterNumberEstimate:
    """An estimated number of clusters, and how the three measures led to it."""

    num_clusters: int
    named: dict[str, int]  # the number that each measure names
    curves: dict[str, list[tuple[int, float]]]  # (K, value) of each measure, from which it picks its number

    @property
    def num_agreeing(self) -> int:
        """How many of the measures name the estimate or a number close by: at most 1, or a sixth of it, away."""
        reach = max(1.0, self.num_clusters / 6)
        return sum(abs(k - self.num_clusters) <= reach for k in self.named.values())

    def summarize(self) -> str:
        """Return the estimate and how sure it is, in one sentence."""
        agreement = {
            1: "they disagree: take it as a guess",
            2: "two of three agree",
            3: "all three agree",
        }[self.num_agreeing]
        return f"{self.num_clusters} clusters by the features alone ({self._list_measures()}): {agreement}"

    def require_several_clusters(self, key: str) -> int:
        """Return the estimate, which must be above 1; `key` is the setting that a user can give instead.

        Raises:
            InputError: where it is 1.
        """
        if self.num_clusters > 1:
            return self.num_clusters
        raise InputError(
            f"the features look like one cloud and no number of clusters stands out ({self._list_measures()})",
            expected="groups that are apart",
            do=f"set {key}=K to what you can use, or give features of another network",
        )

    def _list_measures(self) -> str:
        return ", ".join(f"{measure} {k}" for measure, k in self.named.items())


def sample_rows(num_rows: int, seed: int) -> np.ndarray:
    """Return the sorted indices of a random sample of `num_rows` rows: of all of them up to MAX_ROWS."""
    sample = torch.randperm(num_rows, generator=make_generator(seed, "rows to count clusters in"))[:MAX_ROWS]
    return sample.sort().values.numpy()


def estimate_number_of_clusters(features: Tensor, *, seed: int) -> ClusterNumberEstimate:
    """Estimate the number of clusters in the rows of `features` (M, D), M at most a few thousand (see `sample_rows`).

    Raises:
        InputError: for fewer than 20 rows.
    """
    if len(features) < 20:
        raise InputError(
            f"{len(features)} images are too few to tell the number of clusters from",
            expected="20 at least",
            do="say how many clusters there are",
        )
    rows = project_on_principal_components(features)
    num_distinct = count_distinct_rows(features)
    if num_distinct == 1:
        return ClusterNumberEstimate(1, {"silhouette": 1, "stability": 1, "eigengap": 1}, {})
    max_clusters = min(MAX_CLUSTERS, len(rows) // 10, num_distinct)
    reference = torch.randn(rows.shape, generator=make_generator(seed, "one cloud")).to(rows) * rows.std(0)
    numbers = numbers_to_try(max_clusters)
    silhouettes, stabilities = compute_silhouettes_and_stabilities(rows, numbers, seed)
    reference_silhouettes, reference_stabilities = compute_silhouettes_and_stabilities(reference, numbers, seed)
    eigengaps, reference_eigengaps = compute_eigengaps(rows, max_clusters), compute_eigengaps(reference, max_clusters)
    curves = {
        "silhouette": [
            (k, value - expected)
            for k, value, expected in zip(numbers, silhouettes, reference_silhouettes, strict=True)
        ],
        "stability": [
            (k, (value - expected) / max(1 - expected, MIN_STABILITY_GAP))
            for k, value, expected in zip(numbers, stabilities, reference_stabilities, strict=True)
        ],
        "eigengap": list(enumerate(eigengaps, start=1))[1:],
    }
    named = {
        "silhouette": pick_number(curves["silhouette"], margin=MARGINS["silhouette"], tie=0),
        "stability": pick_number(curves["stability"], margin=MARGINS["stability"], tie=STABILITY_TIE),
        "eigengap": pick_number(curves["eigengap"], margin=MARGINS["eigengap"] * max(reference_eigengaps[1:]), tie=0),
    }
    return ClusterNumberEstimate(int(median(named.values())), named, curves)


def numbers_to_try(max_clusters: int) -> list[int]:
    """Return the numbers of clusters to try: 2, 3, ..., 16 and from there on steps of an eighth, up to `max_clusters`.

    The 2 is always among them.
    """
    numbers = [2]
    while (following := numbers[-1] + max(1, numbers[-1] // 8)) <= max_clusters:
        numbers.append(following)
    return numbers


def count_distinct_rows(rows: Tensor) -> int:
    """Return how many of the rows (M, D) differ by more than rounding errors.

    Images that are copies have features that differ in the last digits, by the batch that they were computed in.
    """
    from scipy.sparse.csgraph import connected_components  # takes a moment, and few runs need it

    distances = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    number, _ = connected_components((distances <= ROUNDING_ERROR * rows.norm(dim=1).max()).numpy(), directed=False)
    return int(number)


def project_on_principal_components(features: Tensor) -> Tensor:
    """Return the centred rows (M, D) in the coordinates of at most MAX_COMPONENTS principal components, in float32."""
    rows = features.double()
    rows = rows - rows.mean(0)
    _, _, components = torch.linalg.svd(rows, full_matrices=False)
    return (rows @ components[:MAX_COMPONENTS].T).float()


def compute_silhouettes_and_stabilities(
    rows: Tensor, numbers: Sequence[int], seed: int
) -> tuple[list[float], list[float]]:
    """Return the silhouette and the stability of k-means on `rows` (M, D), for each number of clusters."""
    from sklearn.metrics import adjusted_rand_score, silhouette_score  # takes half a second, and few runs need it

    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    subsample_size = int(SUBSAMPLE_SHARE * len(rows))
    subsamples = [
        torch.randperm(len(rows), generator=make_generator(seed, "part of the rows", number))[:subsample_size]
        for number in range(NUM_SUBSAMPLES)
    ]
    silhouettes, stabilities = [], []
    for k in track(numbers, "trying numbers of clusters"):
        assignments = run_kmeans(rows, k, seed).assignments
        if assignments.unique().numel() > 1:
            silhouettes.append(float(silhouette_score(distances, assignments, metric="precomputed")))
        else:
            silhouettes.append(0.0)  # all rows are identical
        assignments_by_subsample = [
            nearest_centroids(rows, run_kmeans(rows[subsample], k, seed).centroids, metric="euclidean")[0]
            for subsample in subsamples
        ]
        pairs = combinations(assignments_by_subsample, 2)
        stabilities.append(mean(float(adjusted_rand_score(a, b)) for a, b in pairs))
    return silhouettes, stabilities


def run_kmeans(rows: Tensor, k: int, seed: int) -> KMeansResult:
    return kmeans(
        rows,
        num_clusters=k,
        metric="euclidean",
        restarts=range(KMEANS_RESTARTS),
        max_iterations=KMEANS_MAX_ITERATIONS,
        tolerance=KMEANS_TOLERANCE,
        key=(seed, "number of clusters", k),
    )


def compute_eigengaps(rows: Tensor, count: int) -> list[float]:
    """Return the gap after each of the `count` smallest eigenvalues of the neighbour graph's normalised Laplacian."""
    weights = build_neighbor_graph(rows, min(NUM_NEIGHBORS, len(rows) - 1)).dense()
    scale = weights.sum(1).clamp(min=1e-12).rsqrt()
    normalised = scale[:, None] * weights * scale
    eigenvalues = 1 - torch.linalg.eigvalsh((normalised + normalised.T) / 2).flip(0)
    return eigenvalues[: count + 1].diff().tolist()


def pick_number(curve: list[tuple[int, float]], *, margin: float, tie: float) -> int:
    """Return the largest K whose value is at most `tie` below the best one; 1 where no value is above `margin`."""
    best = max(value for _, value in curve)
    if best <= margin:
        return 1
    return max(k for k, value in curve if value >= best - tie)
