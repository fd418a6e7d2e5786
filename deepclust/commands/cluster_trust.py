"""How far to trust clusters that nobody has labels for."""

from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from omegaconf import DictConfig
from sklearn.metrics import adjusted_rand_score

from deepclust.clustering.distributed_kmeans import dealt_kmeans
from deepclust.datasets.image_sources import ImageSet
from deepclust.runs.assignments import read_clusters
from deepclust.runs.results import read_results

LEVELS = {0.8: "well", 0.5: "fairly"}  # mean ARI between seeds from which on; below: hardly
DOWN = {"well": "fairly", "fairly": "hardly", "hardly": "hardly"}
GIANT = 4.0  # times the mean size


def measure_trust(
    cfg: DictConfig, vectors: ImageSet, health: dict[str, float], runs: dict[int, Path], *, is_own_network: bool
) -> dict[str, Any]:
    """How far to trust the clusters: whether seeds, and plain k-means on the same features, come to the same ones.

    That is about what can be repeated with these features. Seeds agree as well on features that tell little but
    colours apart, such as those of a small network that has seen a few hundred photos (`is_own_network`); it is said.
    With one cluster, or one for every image, they agree whatever the features are: that is said in place of a level.
    """
    clusters = {seed: read_clusters(run) for seed, run in runs.items()}
    sizes = np.bincount(clusters[cfg.seed])
    results = read_results(runs[cfg.seed]) or {}
    num_clusters, largest = results["num_clusters"], float(sizes.max() / sizes.sum())
    trust: dict[str, Any] = {"seeds": list(runs), "empty_clusters": health["empty_clusters"], "largest_share": largest}
    is_giant = largest > min(0.9, GIANT / num_clusters) and num_clusters > 1
    trivial = {1: "one cluster holds every image", len(clusters[cfg.seed]): "there is a cluster for every image"}.get(
        num_clusters
    )
    phrases = [] if trivial is None else [f"nothing to tell by, for {trivial}"]
    level = None
    if len(clusters) > 1 and trivial is None:
        trust["ari_between_seeds"] = mean(
            float(adjusted_rand_score(a, b)) for a, b in combinations(clusters.values(), 2)
        )
        level = next((name for least, name in LEVELS.items() if trust["ari_between_seeds"] >= least), "hardly")
        level = DOWN[level] if is_giant or health["empty_clusters"] else level
        phrases.append(f"{len(clusters)} seeds agree to {trust['ari_between_seeds']:.2f} (ARI; 1 is the same)")
    if results["method"] != "kmeans" and trivial is None:
        rows = vectors.fit.read(np.arange(len(vectors.fit))).flatten(1)
        kmeans = dealt_kmeans(
            rows,
            num_clusters=num_clusters,
            metric="euclidean",
            num_restarts=cfg.evaluation.kmeans_restarts,
            max_iterations=cfg.evaluation.kmeans_max_iterations,
            tolerance=cfg.evaluation.kmeans_tolerance,
            key=(cfg.seed, "k-means beside the clusters"),
        )
        trust["ari_with_kmeans"] = float(adjusted_rand_score(clusters[cfg.seed], kmeans.assignments.cpu().numpy()))
        phrases.append(f"plain k-means on the same features to {trust['ari_with_kmeans']:.2f}")
    empty = int(health["empty_clusters"])
    phrases.append(f"{empty or 'no'} cluster{'s are' if empty > 1 else ' is'} empty")
    giant = ", far more than its part" if is_giant else ""
    phrases.append(f"the largest holds {100 * largest:.1f} % of the images{giant}")
    verdict = f"{level} repeatable, " if level else ""
    trust["message"] = f"how far to trust the clusters: {verdict}{', '.join(phrases)}"
    if is_own_network:
        trust["message"] += "; the network has seen these images alone, so take them for a first look"
    return trust
