"""How far clusters without labels can be trusted: whether other seeds and plain k-means find the same ones."""

from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from omegaconf import DictConfig
from sklearn.metrics import adjusted_rand_score

from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from deepclust.clustering.unit_rows import draw_rows
from deepclust.datasets.image_sources import ImageSet, read_vectors
from deepclust.runs.assignments_csv import read_assignments
from deepclust.runs.results import read_results

LEVELS = {0.8: "well", 0.5: "fairly"}  # by the least mean ARI between seeds; below the last one: hardly
NEXT_LOWER_LEVEL = {"well": "fairly", "fairly": "hardly", "hardly": "hardly"}
MAX_COMPARED = 20_000  # images that plain k-means clusters for comparison
GIANT_FACTOR = 4.0  # a cluster this many times as large as the mean one is a giant


def measure_trust(
    cfg: DictConfig, vectors: ImageSet, health: dict[str, float], runs: dict[int, Path], *, is_own_network: bool
) -> dict[str, Any]:
    """Return the section `trust` of results.json: how far other seeds and plain k-means find the same clusters.

    `runs` are the run folders by seed. The measures tell what can be repeated with these features, not whether the
    features are good: seeds agree as well on features that tell little but colours apart, such as those of a small
    network that has seen a few hundred photos (`is_own_network`), and the message says so. Where one cluster holds
    every image, or each image has its own, seeds agree whatever the features are; then the message says that in place
    of a level.
    """
    clusters = {seed: np.array(read_assignments(run)["cluster"]) for seed, run in runs.items()}
    sizes = np.bincount(clusters[cfg.seed])
    results = read_results(runs[cfg.seed]) or {}
    num_clusters, largest = results["num_clusters"], float(sizes.max() / sizes.sum())
    trust: dict[str, Any] = {"seeds": list(runs), "empty_clusters": health["empty_clusters"], "largest_share": largest}
    is_giant = largest > min(0.9, GIANT_FACTOR / num_clusters) and num_clusters > 1
    num_filled, num_images = int((sizes > 0).sum()), len(clusters[cfg.seed])
    trivial = {1: "one cluster holds every image", num_images: "there is a cluster for every image"}.get(num_filled)
    phrases = [] if trivial is None else [f"nothing to tell by, for {trivial}"]
    level = None
    if len(clusters) > 1 and trivial is None:
        trust["ari_between_seeds"] = mean(
            float(adjusted_rand_score(a, b)) for a, b in combinations(clusters.values(), 2)
        )
        level = next((name for least, name in LEVELS.items() if trust["ari_between_seeds"] >= least), "hardly")
        level = NEXT_LOWER_LEVEL[level] if is_giant or health["empty_clusters"] else level
        phrases.append(f"{len(clusters)} seeds agree to {trust['ari_between_seeds']:.2f} (ARI; 1 is the same)")
    if results["method"] != "kmeans" and trivial is None:
        # Of many images a sample tells as much, and k-means on all of them would take longer than the clusters did.
        drawn = draw_rows(num_images, MAX_COMPARED, cfg.seed, "k-means beside the clusters")
        rows = read_vectors(vectors.evaluation, drawn)
        kmeans = kmeans_on_all_ranks(
            rows,
            num_clusters=num_clusters,
            metric="euclidean",
            num_restarts=cfg.evaluation.kmeans_restarts,
            max_iterations=cfg.evaluation.kmeans_max_iterations,
            tolerance=cfg.evaluation.kmeans_tolerance,
            key=(cfg.seed, "k-means beside the clusters"),
        )
        trust["ari_with_kmeans"] = float(
            adjusted_rand_score(clusters[cfg.seed][drawn], kmeans.assignments.cpu().numpy())
        )
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
