"""What `deepclust cluster` finds beside the clusters: their names, copies, near-duplicates, outliers and a tree."""

import logging
from typing import Any

import numpy as np
from omegaconf import DictConfig

from deepclust.backbones.imagenet_words import name_clusters, predict_classes, read_class_words, read_classifier
from deepclust.clustering.merge_order import order_merges
from deepclust.clustering.near_duplicates import find_near_duplicates, join_groups
from deepclust.clustering.outliers import choose_outliers, score_outliers
from deepclust.commands.cluster_numbers import list_numbers
from deepclust.config.plain_values import resolve_to_dict
from deepclust.datasets.identical_files import find_identical_files
from deepclust.datasets.image_sources import ImageSet
from deepclust.engine.progress_bar import announce
from deepclust.report.findings import Findings

log = logging.getLogger(__name__)


def describe_what_is_shown(cfg: DictConfig) -> dict[str, Any]:
    """Return the keys of `deepclust cluster` that decide on what is looked for and shown, not on the clusters."""
    numbers = list_numbers(cfg.num_clusters)
    shown = {"duplicates": cfg.duplicates, "outliers": cfg.outliers, "report": resolve_to_dict(cfg.report)}
    return shown | ({"numbers": numbers} if len(numbers) > 1 else {})


def find_in_images(
    cfg: DictConfig,
    images: ImageSet,
    features: np.ndarray,
    assignments: np.ndarray,
    *,
    network_cfg: DictConfig | None,
    is_own_network: bool,
) -> Findings:
    """Return what is found in images with these features (M, D) and clusters (M,).

    `network_cfg` is the configuration of the network that made the features; None for vectors, among which only equal
    rows would be duplicates, so that none are looked for. A network trained on these images (`is_own_network`) has no
    words for what it sees.
    """
    names: dict[int, str] = {}
    if network_cfg is not None and not is_own_network:
        classifier = read_classifier(resolve_to_dict(network_cfg)["backbone"])
        if classifier is not None and classifier[0].shape[1] == features.shape[1]:
            names = name_clusters(assignments, predict_classes(features, classifier), read_class_words())
    copies: list[list[int]] = []
    duplicates = scores = outliers = None
    if cfg.duplicates and network_cfg is not None:
        copies = find_identical_files(images.paths or [])
        with announce("looking for near-duplicates"):
            duplicates = join_groups(copies, find_near_duplicates(features, seed=cfg.seed))
        log.info("near-duplicates: %d groups, %d of them with copies of a file", len(duplicates), len(copies))
    if cfg.outliers:
        repeated = np.zeros(len(features), bool)
        repeated[[row for group in duplicates or [] for row in group[1:]]] = True
        with announce("looking for outliers"):
            scores = score_outliers(features, seed=cfg.seed, repeated=repeated)
        outliers = choose_outliers(scores)
        log.info("outliers: %d of %d", len(outliers), len(features))
    return Findings(
        names=names,
        merges=order_merges(features, assignments),
        copies=copies,
        duplicates=duplicates,
        outlier_scores=scores,
        outliers=outliers,
    )
