"""A data set held against what a run was told of it: open values are read off the images, wrong ones are refused."""

from collections.abc import Mapping
from typing import Any

from deepclust.clustering.number_of_clusters import Estimate, estimate_number, sample_rows
from deepclust.datasets.image_sources import ImageSet
from deepclust.errors import InputError


def infer_dataset_values(declared: Mapping[str, Any], images: ImageSet) -> dict[str, Any]:
    """Return what the images say of themselves, by key of the section `dataset`: num_images, channels and so on.

    `declared` is that section; values that it leaves open (None) are those to fill in.

    Raises:
        InputError: if a declared value is another; it names the key to change.
    """
    height, _, channels = images.fit.shape
    found: dict[str, Any] = {"num_images": len(images.fit), "channels": channels}
    if images.name is not None and declared["name"] is None:
        found["name"] = images.name
    if declared["image_size"] is None:
        found["image_size"] = height
    if declared["num_classes"] is None and images.labels is not None:
        found["num_classes"] = len(images.class_names) if images.class_names else int(images.labels.max()) + 1
    for key, value in found.items():
        given = declared.get(key)
        if given is not None and given != value:
            raise InputError(
                f"dataset.{key} is {given} and the images of {declared['name']} have {value}",
                expected="the same number",
                do=f"set dataset.{key}={value}",
            )
    return found


def check_num_clusters(num_clusters: Any, *, num_images: int) -> None:
    """Check that the number of clusters is one that these images can have.

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
            f"dataset.num_clusters is {num_clusters} and there are {num_images} images",
            expected="between 1 cluster and one for each image",
            do="set dataset.num_clusters",
        )


def estimate_num_clusters(images: ImageSet, *, seed: int) -> Estimate:
    """Estimate how many clusters the vectors of a data set hold, without looking at labels.

    Raises:
        InputError: if it holds pictures, which say little before a network has seen them, or too few vectors.
    """
    if images.fit.shape[:2] != (1, 1):
        raise InputError(
            "the number of clusters can be told from features, and these are pictures",
            expected="dataset=features, or a number",
            do="run deepclust cluster images=DIR num_clusters=auto, or set dataset.num_clusters=K",
        )
    rows = images.fit.read(sample_rows(len(images.fit), seed)).flatten(1)
    return estimate_number(rows, seed=seed)
