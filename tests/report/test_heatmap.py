"""The contingency table in the page: its order, shades and numbers."""

from pathlib import Path

import numpy as np

from deepclust.report.heatmap import match_clusters_to_classes
from tests.report.pages import write_page


def test_rows_of_the_table_follow_the_matching(tmp_path: Path) -> None:
    table = np.array([[1, 0, 7, 0], [9, 2, 0, 3]])  # 2 classes in 4 clusters: 2 -> class 0, 0 -> class 1
    page = write_page(tmp_path, contingency_table=table, class_names=["cat", "dog"])
    cells = page.text.split("shade: share of the cluster")[1].split("Run\n")[0].split()
    assert " ".join(cells) == "cat dog 2 7 0 1 9 1 2 3 3"  # zeros are left blank
    opacities = [style.partition("/")[2] for style in page.values("td", "style")]
    assert opacities == ["0.70)", "0.07)", "0.63)", "0.70)", "0.70)"]  # 0.7 times the share of the cluster


def test_a_large_table_is_one_picture(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(60)
    table = np.zeros((60, 60), int)
    table[order, np.arange(60)] = 5  # cluster k holds class order[k] only
    (image,) = write_page(tmp_path, contingency_table=table).images()
    np.testing.assert_array_equal(image[..., 3], 255 * np.eye(60))


def test_a_table_of_unlabelled_images_is_left_out(tmp_path: Path) -> None:
    assert "table" not in write_page(tmp_path, contingency_table=np.zeros((2, 3), int)).tags


def test_clusters_that_are_more_than_the_classes_stay_unmatched() -> None:
    assert match_clusters_to_classes(np.array([[1, 0, 7, 0], [9, 2, 0, 3]])).tolist() == [1, 2, 0, 2]
    assert match_clusters_to_classes(np.array([[1, 0], [0, 5], [9, 0]])).tolist() == [2, 1]
