"""Images of a Python program that are scaled to 8 bits: where nothing is printed, a warning says so."""

import warnings

import numpy as np
import pytest

import deepclust
from deepclust.runs.inputs_in_memory import warn_of_scaling

IMAGES = np.arange(4 * 5 * 5).reshape(4, 5, 5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES / 99, r"^x holds float64: floats from 0 to 1 are scaled to 0 to 255"),
        (IMAGES[..., None] * 2.5, r"^x holds float64: floats from 0 to 255 are "),
        (IMAGES - 50, r"^x holds int64: integers from -50 to 49 are "),
    ],
)
def test_a_warning_says_by_which_range(images, message):
    with pytest.warns(UserWarning, match=message):
        warn_of_scaling(images, "x")


@pytest.mark.parametrize("array", [IMAGES.astype(np.uint8), IMAGES.reshape(4, 25) / 99])
def test_images_of_8_bits_and_vectors_are_not_scaled(array):
    with warnings.catch_warnings(action="error"):
        warn_of_scaling(array, "x")


def test_images_that_are_trained_on_are_warned_of_unless_the_run_is_shown(tmp_path):
    """The labels do not fit, so that nothing is trained."""
    run = {"labels": [0], "run_dir": tmp_path}
    with pytest.warns(UserWarning, match="^dataset holds float64") as warned, pytest.raises(deepclust.InputError):
        deepclust.train("kmeans", IMAGES / 99, verbose=False, **run)
    assert warned[0].filename == __file__
    with warnings.catch_warnings(action="error"), pytest.raises(deepclust.InputError):
        deepclust.train("kmeans", IMAGES / 99, verbose=True, **run)
