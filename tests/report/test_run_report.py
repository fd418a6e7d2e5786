"""The report of a run: which pictures it shows, and that nothing else of the program waits for its imports."""

import subprocess
import sys

import numpy as np

from deepclust.datasets.image_sources import ImageSet, VectorSource
from deepclust.report.run_report import find_pictures
from tests.report.pages import make_numbered_images


def test_images_are_their_own_pictures_and_vectors_have_those_given_with_them() -> None:
    images, vectors = make_numbered_images(2), VectorSource([np.zeros((2, 3), np.float32)])
    assert find_pictures(ImageSet(images, images)) is images
    assert find_pictures(ImageSet(vectors, vectors)) is None
    assert find_pictures(ImageSet(vectors, vectors, pictures=images)) is images


def test_the_command_line_does_not_import_what_the_report_needs() -> None:
    code = "import sys, deepclust.cli.main; print({'torch', 'sklearn', 'PIL', 'deepclust.report'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
