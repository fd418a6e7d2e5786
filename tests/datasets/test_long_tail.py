"""Long-tailed variants: how many images of each class are kept, that they are the same every time, and refusals."""

import numpy as np
import pytest

from deepclust.datasets.image_sources import ArraySource, ImageSet
from deepclust.datasets.long_tail import make_long_tailed
from deepclust.errors import InputError

NUM_CLASSES, PER_CLASS = 5, 1000


def make_images(labels, **others) -> ImageSet:
    """Return images of one pixel whose value is the last byte of their position."""
    source = ArraySource([(np.arange(len(labels)) % 256).astype(np.uint8).reshape(-1, 1, 1, 1)])
    return ImageSet(source, source, labels=labels, **others)


def make_labels() -> np.ndarray:
    return np.random.default_rng(0).permutation(np.arange(NUM_CLASSES * PER_CLASS) % NUM_CLASSES)


def test_classes_shrink_by_the_same_factor_and_everything_stays_together():
    labels = make_labels()
    paths = [f"{label}/{row}" for row, label in enumerate(labels)]
    images = make_images(labels, paths=paths, pictures=ArraySource([labels.astype(np.uint8).reshape(-1, 1, 1, 1)]))
    kept = make_long_tailed(images, 0.1)
    counts = np.bincount(kept.labels)
    shares = 0.1 ** (np.arange(NUM_CLASSES) / (NUM_CLASSES - 1))
    deviations = np.sqrt(PER_CLASS * shares * (1 - shares))
    assert counts[0] == PER_CLASS and (abs(counts - PER_CLASS * shares) <= 4 * deviations).all()
    assert kept.fit is kept.evaluation and len(kept.fit) == len(kept.labels) == len(kept.paths)
    rows = np.array([int(path.split("/")[1]) for path in kept.paths])
    assert (np.diff(rows) > 0).all(), "in order"
    everything = np.arange(len(rows))
    np.testing.assert_array_equal(kept.labels, labels[rows])
    np.testing.assert_array_equal(kept.fit.read(everything).flatten(), rows % 256)
    np.testing.assert_array_equal(kept.pictures.read(everything).flatten(), kept.labels)


def test_the_same_images_are_kept_every_time_and_more_of_them_with_less_imbalance():
    images = make_images(make_labels(), paths=[str(row) for row in range(NUM_CLASSES * PER_CLASS)])
    tenth, again, hundredth = (make_long_tailed(images, imbalance) for imbalance in (0.1, 0.1, 0.01))
    assert tenth.paths == again.paths
    assert set(hundredth.paths) < set(tenth.paths)
    assert make_long_tailed(images, 1.0).paths == images.paths
    assert make_long_tailed(images, None) is images


def test_images_of_unknown_class_are_left_out_and_a_single_class_stays_whole():
    assert make_long_tailed(make_images(np.array([0, -1, 0])), 0.5).labels.tolist() == [0, 0]


def test_classes_without_images_count_where_they_have_names():
    labels = np.repeat([0, 1], 1000)
    kept = make_long_tailed(make_images(labels, class_names=["a", "b", "c"]), 0.01)
    assert 60 < np.bincount(kept.labels)[1] < 140, "the second class of three, of which a tenth is kept"


@pytest.mark.parametrize("labels", [None, np.array([-1, -1])])
def test_a_set_without_labels_is_refused(labels):
    source = ArraySource([np.zeros((2, 1, 1, 1), np.uint8)])
    with pytest.raises(InputError, match="has no labels") as refused:
        make_long_tailed(ImageSet(source, source, labels=labels), 0.5)
    assert "dataset.imbalance=null" in refused.value.do


def test_a_set_that_is_scored_on_other_images_is_refused():
    sources = [ArraySource([np.zeros((2, 1, 1, 1), np.uint8)]) for _ in range(2)]
    with pytest.raises(InputError, match="other images are scored") as refused:
        make_long_tailed(ImageSet(*sources, labels=np.array([0, 1])), 0.5)
    assert "dataset.source.evaluate=null" in refused.value.do
