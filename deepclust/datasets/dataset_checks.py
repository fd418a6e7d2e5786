"""Checks of the section `dataset` of a configuration against the images: missing values are inferred from them."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from deepclust.clustering.number_of_clusters import ClusterNumberEstimate, estimate_number_of_clusters, sample_rows
from deepclust.datasets.image_sources import ImageSet, ImageSource, read_vectors
from deepclust.engine.plurals import format_count
from deepclust.errors import InputError

log = logging.getLogger(__name__)

LARGEST_OFFSET = 100  # of vectors from 0, in their standard deviations; batch normalisation copes with less
VALUES_PER_CHUNK = 2**24  # of vectors that are read at a time


def infer_dataset_values(declared: Mapping[str, Any], images: ImageSet) -> dict[str, Any]:
    """Return values that follow from the images, by their key in the section `dataset`: num_images, channels and so on.

    `declared` is the section `dataset` as configured. The number of images and of channels are always inferred; name,
    image_size and num_classes only where the section leaves them open (None) and the images tell them, value_ranges
    where there are values of more than 8 bits.

    With `standardize`, mean and std are those of the vectors.

    Raises:
        InputError: if a configured value contradicts the images; it names the key to change.
    """
    height, _, channels = images.fit.shape
    inferred: dict[str, Any] = {"num_images": len(images.fit), "channels": channels}
    if images.name is not None and declared["name"] is None:
        inferred["name"] = images.name
    if declared["image_size"] is None and height is not None:
        inferred["image_size"] = height
    if declared["num_classes"] is None and images.labels is not None:
        inferred["num_classes"] = len(images.class_names) if images.class_names else int(images.labels.max()) + 1
    for key, value in inferred.items():
        configured = declared.get(key)
        if configured is not None and configured != value:
            raise InputError(
                f"dataset.{key} is {configured} and the images of {declared['name']} have {value}",
                expected="the same number",
                do=f"set dataset.{key}={value}",
            )
    if declared.get("standardize"):
        inferred |= standardization(images.fit)
    if images.value_ranges:  # kept with the run, so that new images are scaled alike
        inferred["value_ranges"] = {kind: list(pair) for kind, pair in images.value_ranges.items()}
    return inferred


def compute_mean_and_std(source: ImageSource) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean (channels,) and the standard deviation (channels,) of all vectors of a source, in float64."""
    chunks = np.array_split(np.arange(len(source)), -(-len(source) * source.shape[2] // VALUES_PER_CHUNK))
    vectors = [lambda rows=rows: read_vectors(source, rows).double().numpy() for rows in chunks]
    mean = np.sum([read().sum(0) for read in vectors], 0) / len(source)
    squares = np.sum([((read() - mean) ** 2).sum(0) for read in vectors], 0)
    return mean, np.sqrt(squares / len(source))


def standardization(source: ImageSource) -> dict[str, list[float]]:
    """Return mean and std of the vectors of a source, as values of the section `dataset`; a std of 0 becomes 1."""
    mean, std = compute_mean_and_std(source)
    return {"mean": mean.tolist(), "std": np.where(std > np.finfo(np.float32).tiny, std, 1.0).tolist()}


def warn_of_offset(declared: Mapping[str, Any], images: ImageSet) -> None:
    """Warn if vectors lie so far from the origin, for how they differ, that a network cannot learn from them.

    `declared` is the section `dataset` with its values filled in.
    """
    if "standardize" not in declared or declared["mean"] is not None:
        return
    mean, std = compute_mean_and_std(images.fit)
    offset, spread = float(np.abs(mean).max()), float(np.sqrt((std**2).mean()))
    if offset > LARGEST_OFFSET * spread > 0:
        log.warning(
            "the vectors lie %.0f times as far from 0 as they differ from each other, so that a network sees them all "
            "alike: set dataset.standardize=true",
            offset / spread,
        )


def check_num_clusters(num_clusters: Any, *, num_images: int) -> None:
    """Check that `num_clusters` is a possible number of clusters for that many images.

    Raises:
        InputError: if it is not a whole number from 1 to the number of images.
    """
    if not isinstance(num_clusters, int):
        raise InputError(
            f"dataset.num_clusters is {num_clusters}",
            expected="the number of clusters to find",
            do="set dataset.num_clusters=K",
        )
    if not 1 <= num_clusters <= num_images:
        raise InputError(
            f"dataset.num_clusters is {num_clusters} and the data set holds {format_count(num_images, 'image')}",
            expected="between 1 cluster and one for each image",
            do="set dataset.num_clusters",
        )


def estimate_num_clusters(images: ImageSet, *, seed: int) -> ClusterNumberEstimate:
    """Estimate the number of clusters of a data set of vectors, without its labels.

    Raises:
        InputError: if the data set holds images, whose pixels do not tell the number of clusters, or too few vectors.
    """
    if images.fit.shape[:2] != (1, 1):
        raise InputError(
            "the number of clusters cannot be estimated from the pixels of images",
            expected="features (dataset=features), or a number",
            do="run deepclust cluster images=DIR num_clusters=auto, or set dataset.num_clusters=K",
        )
    rows = read_vectors(images.fit, sample_rows(len(images.fit), seed))
    return estimate_number_of_clusters(rows, seed=seed)
