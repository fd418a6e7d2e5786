"""Long-tailed variants of data sets: of each class a smaller share of the images than of the class before it."""

from dataclasses import replace

import numpy as np
import torch

from deepclust.datasets.image_sources import ImageSet
from deepclust.datasets.labels import UNKNOWN
from deepclust.datasets.sampled_rows import SampledRows
from deepclust.engine.randomness import make_generator
from deepclust.errors import InputError

LONG_TAIL_KEY = "long tail"  # of the random numbers, which are the same for all runs


def make_long_tailed(images: ImageSet, imbalance: float | None) -> ImageSet:
    """Return the data set with class k kept with the probability r^(k / (C - 1)); None returns it as it is.

    `imbalance` is r, in (0, 1]: the share that is left of the last of the C classes. Images stay in order, and those of
    unknown class are left out. An image is kept or not whatever the seed of the run, and what is kept with a smaller r
    is kept with a larger one, too. Labels serve here, where the data set is made, and go no further than before. Extra
    images, which belong to no cluster, all stay.

    Raises:
        InputError: if there are no labels of the images that are trained on.
    """
    if imbalance is None:
        return images
    what = f"dataset.imbalance is {imbalance:g}"
    if images.labels is None or not (images.labels != UNKNOWN).any():
        raise InputError(
            f"{what} and the data set has no labels",
            expected="the class of each image, which decides how many are kept",
            do="set dataset.imbalance=null",
        )
    if images.fit is not images.evaluation:
        raise InputError(
            f"{what} and other images are scored than those that are trained on, whose labels are not read",
            expected="a data set that is trained and scored on the same images",
            do="set dataset.source.evaluate=null where the data set has this key, or dataset.imbalance=null",
        )
    num_classes = len(images.class_names) if images.class_names else int(images.labels.max()) + 1
    shares = imbalance ** (np.arange(num_classes) / max(num_classes - 1, 1))
    draws = torch.rand(len(images.labels), generator=make_generator(LONG_TAIL_KEY), dtype=torch.float64).numpy()
    rows = np.flatnonzero((images.labels != UNKNOWN) & (draws < shares[images.labels]))
    kept = SampledRows(images.fit, rows)
    return replace(
        images,
        fit=kept,
        evaluation=kept,
        labels=images.labels[rows],
        paths=None if images.paths is None else [images.paths[row] for row in rows],
        pictures=None if images.pictures is None else SampledRows(images.pictures, rows),
        unreadable=(),  # their positions are those among all images
    )
