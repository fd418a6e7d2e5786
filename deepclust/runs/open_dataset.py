"""The images of a run, as the section `dataset` of its configuration describes them."""

from omegaconf import DictConfig

from deepclust.config.build import build
from deepclust.datasets.image_sources import ImageSet
from deepclust.datasets.long_tail import make_long_tailed


def open_dataset(dataset: DictConfig) -> ImageSet:
    """Return the data set of a section `dataset`, the same images whenever it is opened.

    Raises:
        InputError: if it cannot be read, or cannot be had with the `imbalance` of the section.
    """
    images: ImageSet = build(dataset.source)
    return make_long_tailed(images, dataset.get("imbalance"))  # runs of earlier versions do not have the key
