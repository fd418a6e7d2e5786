"""How many clusters features hold: three views of the question, none of which knows a label.

Each looks at a number K of clusters in its own way and names the one that it likes best:

silhouette  How much nearer a row is to its own cluster of k-means than to the next one (Rousseeuw 1987), the mean.
stability   How alike two k-means sort all rows whose centroids come from two random parts of them, in ARI, the mean
            over the pairs of SPLITS parts (von Luxburg 2010, "Clustering stability: an overview", section 2).
eigengap    How far the K-th smallest eigenvalue of the neighbour graph's normalised Laplacian is from the next (von
            Luxburg 2007, "A tutorial on spectral clustering", section 8.3). K nearly separate parts: K near 0.

Each has a taste for some K whatever the data, so each is held against itself on one normal cloud with the covariance of
the data, as the gap statistic does (Tibshirani, Walther, Hastie 2001). Silhouette: the K with the largest lead over the
cloud. Stability: the K with the largest share of what the cloud leaves open up to 1, and the largest of nearly equal
ones, for two groups of groups are as stable as the groups themselves. Eigengap: the largest gap after the first. Where
the best is not above its margin (for the eigengap, half as large again as the cloud's largest), a measure names 1.

The number is the median of the three: what two of them agree on, if they do. All on a sample of at most ROWS rows and
their COMPONENTS principal components; K is tried up to a tenth of the rows, so that a cluster has ten, and up to MOST.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, median

import numpy as np
import torch
from torch import Tensor

from deepclust.clustering.kmeans import KMeansResult, kmeans, nearest
from deepclust.clustering.neighbor_graph import neighbor_graph
from deepclust.engine.progress import track
from deepclust.engine.randomness import generator
from deepclust.errors import InputError

ROWS, COMPONENTS, MOST = 2000, 50, 50
SPLITS, PART = 4, 0.7  # random parts of the rows, and their size
RESTARTS, ITERATIONS, TOLERANCE = 3, 50, 1e-4  # of every k-means
NEIGHBORS = 10
MARGINS = {"silhouette": 0.05, "stability": 0.3, "eigengap": 1.5}
NEARLY = 0.02  # shares of stability that differ by less are taken for equal
OPEN = 0.5  # at least what the cloud is taken to leave open: where it is stable itself, a little more says little


@dataclass(frozen=True)
class Estimate:
    """A number of clusters, and what led to it."""

    num_clusters: int
    named: dict[str, int]  # by each measure
    curves: dict[str, list[tuple[int, float]]]  # (K, value) of each measure, from which it picks

    @property
    def agreeing(self) -> int:
        """How many of the measures name the number or one close by: at most 1, or a sixth of it, away."""
        reach = max(1.0, self.num_clusters / 6)
        return sum(abs(k - self.num_clusters) <= reach for k in self.named.values())

    def summarize(self) -> str:
        """The number and how sure it is, in one sentence."""
        named = ", ".join(f"{measure} {k}" for measure, k in self.named.items())
        sure = {1: "they disagree: take it as a guess", 2: "two of three agree", 3: "all three agree"}[self.agreeing]
        return f"{self.num_clusters} clusters by the features alone ({named}): {sure}"

    def require_several(self, key: str) -> int:
        """The number.

        Raises:
            InputError: where it is 1, naming the `key` to set.
        """
        if self.num_clusters > 1:
            return self.num_clusters
        named = ", ".join(f"{measure} {k}" for measure, k in self.named.items())
        raise InputError(
            f"the features look like one cloud and no number of clusters stands out ({named})",
            expected="groups that are apart",
            do=f"set {key}=K to what you can use, or give features of another network",
        )


def sample_rows(count: int, seed: int) -> np.ndarray:
    """The indices of at most ROWS of `count` rows, drawn at random, in order."""
    drawn = torch.randperm(count, generator=generator(seed, "rows to count clusters in"))[:ROWS]
    return drawn.sort().values.numpy()


def estimate_number(features: Tensor, *, seed: int) -> Estimate:
    """The number of clusters in the rows of `features` (M, D), M at most a few thousand (`sample_rows`).

    Raises:
        InputError: fewer than 20 rows.
    """
    if len(features) < 20:
        raise InputError(
            f"{len(features)} images are too few to tell the number of clusters from",
            expected="20 at least",
            do="say how many clusters there are",
        )
    rows = principal_components(features)
    most = min(MOST, len(rows) // 10)
    cloud = torch.randn(rows.shape, generator=generator(seed, "one cloud")).to(rows) * rows.std(0)
    sizes = candidates(most)
    data, reference = (try_sizes(x, sizes, seed) for x in (rows, cloud))
    silhouettes, stabilities = (zip(sizes, data[m], reference[m], strict=True) for m in ("silhouette", "stability"))
    gaps, cloud_gaps = eigengaps(rows, most), eigengaps(cloud, most)
    curves = {
        "silhouette": [(k, value - one) for k, value, one in silhouettes],
        "stability": [(k, (value - one) / max(1 - one, OPEN)) for k, value, one in stabilities],
        "eigengap": list(enumerate(gaps, start=1))[1:],
    }
    named = {
        "silhouette": leading(curves["silhouette"], margin=MARGINS["silhouette"], nearly=0),
        "stability": leading(curves["stability"], margin=MARGINS["stability"], nearly=NEARLY),
        "eigengap": leading(curves["eigengap"], margin=MARGINS["eigengap"] * max(cloud_gaps[1:]), nearly=0),
    }
    return Estimate(int(median(named.values())), named, curves)


def candidates(most: int) -> list[int]:
    """2, 3, ... 16 and from there on steps of an eighth, up to `most`."""
    sizes = [2]
    while (following := sizes[-1] + max(1, sizes[-1] // 8)) <= most:
        sizes.append(following)
    return sizes


def principal_components(features: Tensor) -> Tensor:
    """The rows (M, D) about their mean along their main axes, at most COMPONENTS of them, in float32."""
    rows = features.double()
    rows = rows - rows.mean(0)
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)
    return (rows @ axes[:COMPONENTS].T).float()


def try_sizes(rows: Tensor, sizes: Sequence[int], seed: int) -> dict[str, list[float]]:
    """Silhouette and stability of k-means on rows (M, D), for each number of clusters."""
    from sklearn.metrics import adjusted_rand_score, silhouette_score  # half a second, which most runs need not wait

    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    parts = [
        torch.randperm(len(rows), generator=generator(seed, "part of the rows", part))[: int(PART * len(rows))]
        for part in range(SPLITS)
    ]
    silhouettes, stabilities = [], []
    for k in track(sizes, "trying numbers of clusters"):
        whole = fit(rows, k, seed)
        several = whole.assignments.unique().numel() > 1  # rows may all be alike
        silhouettes.append(
            float(silhouette_score(distances, whole.assignments, metric="precomputed")) if several else 0.0
        )
        sorted_by = [nearest(rows, fit(rows[part], k, seed).centroids, metric="euclidean")[0] for part in parts]
        stabilities.append(mean(float(adjusted_rand_score(a, b)) for a, b in combinations(sorted_by, 2)))
    return {"silhouette": silhouettes, "stability": stabilities}


def fit(rows: Tensor, k: int, seed: int) -> KMeansResult:
    return kmeans(
        rows,
        num_clusters=k,
        metric="euclidean",
        restarts=range(RESTARTS),
        max_iterations=ITERATIONS,
        tolerance=TOLERANCE,
        key=(seed, "number of clusters", k),
    )


def eigengaps(rows: Tensor, most: int) -> list[float]:
    """The gap after each of the `most` smallest eigenvalues of the neighbour graph's normalised Laplacian."""
    weights = neighbor_graph(rows, min(NEIGHBORS, len(rows) - 1)).dense()
    scale = weights.sum(1).clamp(min=1e-12).rsqrt()
    affinity = scale[:, None] * weights * scale
    values = 1 - torch.linalg.eigvalsh((affinity + affinity.T) / 2).flip(0)
    return values[: most + 1].diff().tolist()


def leading(curve: list[tuple[int, float]], *, margin: float, nearly: float) -> int:
    """The K of the largest value, the largest K of those at most `nearly` below; 1 where no value is above `margin`."""
    best = max(value for _, value in curve)
    if best <= margin:
        return 1
    return max(k for k, value in curve if value >= best - nearly)
