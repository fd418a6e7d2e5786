"""Generated images of the clusters: how they are arranged in one picture, and where they are shown."""

import numpy as np

from deepclust.report.generated_images import GAP, MAX_CLUSTERS, arrange_samples, describe_samples
from tests.report.pages import make_noise, write_page


def test_rows_are_clusters_and_small_images_are_enlarged():
    samples = make_noise(6, 16, 16, 1).reshape(2, 3, 16, 16, 1)
    picture = arrange_samples(samples)
    assert picture.shape == (2 * 48 + GAP, 3 * 48 + 2 * GAP, 3)
    for cluster in range(2):
        for number in range(3):
            top, left = cluster * (48 + GAP), number * (48 + GAP)
            shown = picture[top : top + 48, left : left + 48]
            for channel in range(3):
                assert np.array_equal(shown[1::3, 1::3, channel], samples[cluster, number, :, :, 0])
    assert (picture[48 : 48 + GAP] == 255).all()


def test_colour_images_keep_their_colours_and_rows_are_limited():
    samples = make_noise(60, 64, 64, 3).reshape(60, 1, 64, 64, 3)
    picture = arrange_samples(samples)
    assert picture.shape == (MAX_CLUSTERS * (64 + GAP) - GAP, 64, 3)
    assert np.array_equal(picture[:64], samples[0, 0])
    assert "the first 50 of 60 clusters" in describe_samples(samples)


def test_the_report_has_a_section_where_there_are_generated_images(tmp_path):
    assert "Generated images" not in write_page(tmp_path).text
    samples = make_noise(6, 8, 8, 1).reshape(3, 2, 8, 8, 1)
    page = write_page(tmp_path, samples=samples)
    assert "Generated images" in page.text and "clusters 0 to 2" in page.text
    assert any(np.array_equal(image, arrange_samples(samples)) for image in page.images())
