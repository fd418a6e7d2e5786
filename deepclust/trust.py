"""How far to trust clusters that nobody has labels for."""

import csv
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from omegaconf import DictConfig
from sklearn.metrics import adjusted_rand_score

from deepclust.clustering.restarts import dealt_kmeans
from deepclust.datasets.source import ImageSet
from deepclust.run_folder import ASSIGNMENTS, read_results

LEVELS = {0.8: "well", 0.5: "fairly"}  # mean ARI between seeds from which on; below: hardly
DOWN = {"well": "fairly", "fairly": "hardly", "hardly": "hardly"}
GIANT = 4.0  # times the mean size


def trust(
    cfg: DictConfig, vectors: ImageSet, health: dict[str, float], runs: dict[int, Path], *, own_network: bool
) -> dict[str, Any]:
    """How far to trust the clusters: whether seeds, and plain k-means on the same features, come to the same ones.

    That is about what can be repeated with these features. Seeds agree as well on features that tell little but
    colours apart, such as those of a small network that has seen a few hundred photos (`own_network`); it is said.
    With one cluster, or one for every image, they agree whatever the features are: that is said in place of a level.
    """
    found = {seed: read_clusters(place) for seed, place in runs.items()}
    sizes = np.bincount(found[cfg.seed])
    results = read_results(runs[cfg.seed]) or {}
    number, largest = results["num_clusters"], float(sizes.max() / sizes.sum())
    said: dict[str, Any] = {"seeds": list(runs), "empty_clusters": health["empty_clusters"], "largest_share": largest}
    giant = largest > min(0.9, GIANT / number) and number > 1
    settled = {1: "one cluster holds every image", len(found[cfg.seed]): "there is a cluster for every image"}.get(
        number
    )
    words = [] if settled is None else [f"nothing to tell by, for {settled}"]
    level = None
    if len(found) > 1 and settled is None:
        said["ari_between_seeds"] = mean(float(adjusted_rand_score(a, b)) for a, b in combinations(found.values(), 2))
        level = next((name for least, name in LEVELS.items() if said["ari_between_seeds"] >= least), "hardly")
        level = DOWN[level] if giant or health["empty_clusters"] else level
        words.append(f"{len(found)} seeds agree to {said['ari_between_seeds']:.2f} (ARI; 1 is the same)")
    if results["method"] != "kmeans" and settled is None:
        rows = vectors.fit.read(np.arange(len(vectors.fit))).flatten(1)
        plain_kmeans = dealt_kmeans(
            rows,
            num_clusters=number,
            metric="euclidean",
            num_restarts=cfg.evaluation.kmeans_restarts,
            max_iterations=cfg.evaluation.kmeans_max_iterations,
            tolerance=cfg.evaluation.kmeans_tolerance,
            key=(cfg.seed, "k-means beside the clusters"),
        )
        said["ari_with_kmeans"] = float(adjusted_rand_score(found[cfg.seed], plain_kmeans.assignments.cpu().numpy()))
        words.append(f"plain k-means on the same features to {said['ari_with_kmeans']:.2f}")
    empty = int(health["empty_clusters"])
    words.append(f"{empty or 'no'} cluster{'s are' if empty > 1 else ' is'} empty")
    words.append(f"the largest holds {100 * largest:.1f} % of the images{', far more than its part' if giant else ''}")
    said["says"] = "how far to trust the clusters: " + (f"{level} repeatable, " if level else "") + ", ".join(words)
    if own_network:
        said["says"] += "; the network has seen these images alone, so take them for a first look"
    return said


def read_clusters(place: Path) -> np.ndarray:
    """The cluster of each image (M,) in a run folder."""
    with (place / ASSIGNMENTS).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return np.array([int(row["cluster"]) for row in csv.DictReader(file)])
