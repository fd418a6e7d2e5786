"""An estimate of how many clusters features hold, by three measures that use no labels.

communities       Into how many communities the graph of each row's NUM_NEIGHBORS nearest falls, by the method of
                  Louvain (Blondel, Guillaume, Lambiotte, Lefebvre 2008) at the resolution COARSE (Reichardt, Bornholdt
                  2006).
fine communities  The same at the resolution FINE, that of modularity as such.
separation        The K at which k-means has the lowest index of Davies and Bouldin (1979): how wide a cluster and the
                  most similar other one are, as a share of the distance between their centroids, the mean over the
                  clusters. Alone it is erratic, so what it names is moved to the nearer end of the range between the
                  two numbers of communities.

The estimate is what separation names within that range. It is sure where all three are close together. On labelled data
the silhouette, the stability of k-means, the gap statistic, the eigengap and merge ratios of a tree mislead more often;
benchmarks/number_of_clusters.py compares them, and docs/photos.md has the table.

Any graph has communities. So the modularity is compared with that of a reference, one normal cloud with the covariance
of the data, as the gap statistic does (Tibshirani, Walther, Hastie 2001): unless it closes MARGIN of the gap between
the reference and 1, or the graph falls apart by itself, there is one cluster.

All of it is computed on a sample of at most MAX_ROWS rows and their first MAX_COMPONENTS principal components. K is
tried up to MAX_CLUSTERS, up to a tenth of the rows, so that a cluster has ten rows on average, and up to the number of
distinct rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.clustering.kmeans import KMeansResult, kmeans
from deepclust.clustering.neighbor_graph import build_neighbor_graph
from deepclust.clustering.unit_rows import draw_rows
from deepclust.engine.progress_bar import track
from deepclust.engine.randomness import make_generator
from deepclust.errors import InputError

MEASURES = ("communities", "fine communities", "separation")
MAX_ROWS, MAX_COMPONENTS, MAX_CLUSTERS = 2000, 50, 50
KMEANS_RESTARTS, KMEANS_MAX_ITERATIONS, KMEANS_TOLERANCE = 3, 50, 1e-4
NUM_NEIGHBORS = 10
COARSE, FINE = 0.5, 1.0
RESOLUTIONS = (0.1, 0.2, COARSE, FINE, 2.0)  # the others are shown in the report
MARGIN = 0.2
ROUNDING_ERROR = 1e-6  # of features in float32, as a share of their length
MAX_CANDIDATES = 3
COUNT_WORDS = {1: "one", 2: "two", 3: "three"}  # of the measures


@dataclass(frozen=True)
class Candidate:
    """A number of clusters, and the measures that name it or a number close by."""

    num_clusters: int
    named_by: list[str]


@dataclass(frozen=True)
class ClusterNumberEstimate:
    """An estimated number of clusters, and how the measures led to it."""

    num_clusters: int
    named: dict[str, int]  # the number that each measure names
    curves: dict[str, list[tuple[int, float]]]  # (K, value) of each measure, from which it picks its number

    @property
    def num_agreeing(self) -> int:
        """How many of the measures name the estimate or a number close by: at most 1, or a fifth of it, away."""
        return sum(is_close(k, self.num_clusters) for k in self.named.values())

    @property
    def is_sure(self) -> bool:
        """Whether all measures name the estimate or a number close by."""
        return self.num_agreeing == len(self.named)

    @property
    def candidates(self) -> list[Candidate]:
        """The estimate, then other numbers that measures name, those of more measures first: MAX_CANDIDATES at most.

        Numbers that are close to each other are one candidate, the lower one of them. One cluster is none. Two have a
        third one between them.
        """
        candidates: dict[int, list[str]] = {self.num_clusters: []}
        for measure, k in sorted(self.named.items(), key=lambda item: item[1]):
            if k == 1:
                continue
            close = [candidate for candidate in candidates if is_close(k, candidate)]
            candidates.setdefault(min(close, key=lambda candidate: abs(candidate - k)) if close else k, []).append(
                measure
            )
        first, *others = (Candidate(k, measures) for k, measures in candidates.items())
        others.sort(key=lambda other: (-len(other.named_by), abs(other.num_clusters - self.num_clusters)))
        if len(others) == 1:
            middle = round(geometric_mean([first.num_clusters, others[0].num_clusters]))
            if middle not in (first.num_clusters, others[0].num_clusters):
                others.append(Candidate(middle, []))
        return [first, *others][:MAX_CANDIDATES]

    def summarize(self) -> str:
        """Return the estimate and how sure it is, in one sentence."""
        number, all_of_them = COUNT_WORDS[self.num_agreeing], COUNT_WORDS[len(self.named)]
        agreement = f"{number} of {all_of_them} agree"
        if self.num_agreeing == len(self.named):
            agreement = f"all {all_of_them} agree"
        elif self.num_agreeing == 1:
            agreement = "they disagree: take it as a guess"
        return f"{self.num_clusters} clusters by the features alone ({self._list_measures()}): {agreement}"

    def describe_doubt(self) -> str | None:
        """Return in a sentence which numbers to look at, where the measures disagree; None where they agree."""
        if self.is_sure:
            return None
        others = [f"num_clusters={candidate.num_clusters}" for candidate in self.candidates[1:]]
        doubt = f"the number of clusters is unsure: {self.num_clusters} is the likeliest by the features alone"
        return f"{doubt}; look at {' and '.join(others)}, too" if others else doubt

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


def is_close(k: int, estimate: int) -> bool:
    """Return whether `k` is at most 1, or a fifth of `estimate`, away from it."""
    return abs(k - estimate) <= max(1.0, estimate / 5)


def sample_rows(num_rows: int, seed: int) -> np.ndarray:
    """Return the sorted indices of a random sample of `num_rows` rows: of all of them up to MAX_ROWS."""
    return draw_rows(num_rows, MAX_ROWS, seed, "rows to count clusters in")


def estimate_number_of_clusters(features: Tensor, *, seed: int) -> ClusterNumberEstimate:
    """Estimate the number of clusters in the rows of `features` (M, D), M at most a few thousand (see `sample_rows`).

    Raises:
        InputError: for fewer than 20 rows.
    """
    import networkx  # takes a moment, and few runs need it

    if len(features) < 20:
        raise InputError(
            f"{len(features)} images are too few to tell the number of clusters from",
            expected="20 at least",
            do="say how many clusters there are",
        )
    rows = project_on_principal_components(features)
    num_distinct = count_distinct_rows(features)
    if num_distinct == 1:
        return ClusterNumberEstimate(1, dict.fromkeys(MEASURES, 1), {})
    max_clusters = min(MAX_CLUSTERS, len(rows) // 10, num_distinct)
    graph = build_graph(rows)
    reference = torch.randn(rows.shape, generator=make_generator(seed, "one cloud")).to(rows) * rows.std(0)
    communities = find_communities(graph, seed)
    expected = find_communities(build_graph(reference), seed)[COARSE][1]
    separations = compute_separations(rows, numbers_to_try(max_clusters), seed)
    curves = {
        "communities": sorted({min(k, max_clusters): value for k, value in communities.values()}.items()),
        "separation": separations,
    }
    is_one_cloud = communities[COARSE][1] - expected <= MARGIN * (1 - expected) and networkx.is_connected(graph)
    if is_one_cloud or not separations:
        return ClusterNumberEstimate(1, dict.fromkeys(MEASURES, 1), curves)
    coarse, fine = sorted(min(communities[resolution][0], max_clusters) for resolution in (COARSE, FINE))
    best_separated, _ = min(separations, key=lambda point: point[1])
    estimate = min(max(best_separated, coarse), fine)
    return ClusterNumberEstimate(estimate, dict(zip(MEASURES, (coarse, fine, estimate), strict=True)), curves)


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


def compute_separations(rows: Tensor, numbers: Sequence[int], seed: int) -> list[tuple[int, float]]:
    """Return, for each number of clusters, the index of Davies and Bouldin of k-means on `rows` (M, D); low is good."""
    from sklearn.metrics import davies_bouldin_score  # takes half a second, and few runs need it

    separations = []
    for k in track(numbers, "trying numbers of clusters"):
        assignments = run_kmeans(rows, k, seed).assignments
        if assignments.unique().numel() > 1:  # else all rows are nearly identical
            separations.append((k, float(davies_bouldin_score(rows, assignments))))
    return separations


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


def build_graph(rows: Tensor) -> Any:
    """Return networkx's graph in which each of `rows` (M, D) has edges to its nearest; all edges weigh the same."""
    import networkx

    neighbor_graph = build_neighbor_graph(rows, min(NUM_NEIGHBORS + 1, len(rows)))
    sources = torch.arange(len(rows)).repeat_interleave(neighbor_graph.starts.diff())
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(rows)))
    graph.add_edges_from(zip(sources.tolist(), neighbor_graph.neighbors.tolist(), strict=True))
    return graph


def find_communities(graph: Any, seed: int) -> dict[float, tuple[int, float]]:
    """Return, for each of RESOLUTIONS, how many communities a graph has, and its modularity."""
    from networkx import community

    found = {}
    for resolution in RESOLUTIONS:
        parts = community.louvain_communities(graph, resolution=resolution, seed=seed)
        found[resolution] = len(parts), float(community.modularity(graph, parts))
    return found
