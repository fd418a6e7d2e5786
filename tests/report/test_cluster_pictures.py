"""Pictures of the clusters: the right images, read back from the page."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepclust.datasets.image_sources import ArraySource
from deepclust.report.cluster_pictures import MAX_BYTES, choose_cluster_pictures
from tests.report.pages import make_noise, make_numbered_images, make_results, write_page


def read_positions(pictures: list) -> list[int]:
    """Return the positions of numbered images, which their first pixels hold."""
    return [int(picture.pixels[0, 0, 0]) for picture in pictures]


def test_lists_hold_the_most_and_the_least_confident_images_of_each_cluster() -> None:
    assignments = np.array([2] * 12 + [0] * 5)
    confidence = np.concatenate([np.linspace(0.1, 0.9, 12), [0.5] * 5])
    source = make_numbered_images(17)
    first, second = choose_cluster_pictures(assignments, confidence, source=source, per_cluster=3, seed=0)
    assert (first.cluster, first.size, first.share) == (2, 12, 12 / 17)  # the largest comes first; 1 is empty
    assert read_positions(first.typical) == [11, 10, 9]
    assert read_positions(first.uncertain) == [0, 1, 2]
    assert len(first.random) == 3 and set(read_positions(first.random)) <= set(range(3, 9))
    assert (second.cluster, second.size) == (0, 5)
    assert read_positions(second.typical) == [12, 13, 14]  # of equally confident images, the first
    assert read_positions(second.uncertain) == [16, 15] and second.random == []  # none is shown twice


def test_random_images_depend_on_the_seed_only() -> None:
    def draw(seed: int) -> list[int]:
        source, zeros = make_numbered_images(200), np.zeros(200, int)
        (cluster,) = choose_cluster_pictures(zeros, np.ones(200), source=source, per_cluster=8, seed=seed)
        return read_positions(cluster.random)

    assert draw(0) == draw(0) != draw(1)


def test_majority_is_counted_over_known_labels() -> None:
    assignments, confidence = np.array([0, 0, 0, 0, 0, 1, 1]), np.ones(7)
    options: dict[str, Any] = {
        "source": make_numbered_images(7),
        "labels": np.array([1, 1, 0, -1, -1, -1, -1]),
        "per_cluster": 1,
        "seed": 0,
    }
    first, second = choose_cluster_pictures(assignments, confidence, class_names=["cat", "dog"], **options)
    assert (first.majority_class, first.purity) == ("dog", 2 / 3)
    assert (second.majority_class, second.purity) == (None, None)
    without_names = choose_cluster_pictures(assignments, confidence, **options)
    assert without_names[0].majority_class == "class 1"


def test_captions_name_the_image() -> None:
    zeros, confidence = np.zeros(2, int), np.array([0.25, 0.5])
    options: dict[str, Any] = {"source": make_numbered_images(2), "per_cluster": 2, "seed": 0}
    (cluster,) = choose_cluster_pictures(zeros, confidence, **options)
    assert [p.caption for p in cluster.typical] == ["image 1, confidence 0.50", "image 0, confidence 0.25"]
    options |= {"paths": ["a.png", "b.png"], "labels": np.array([0, -1])}
    (cluster,) = choose_cluster_pictures(zeros, confidence, **options)
    assert [p.caption for p in cluster.typical] == ["b.png, confidence 0.50", "a.png, confidence 0.25, class 0"]


def test_images_of_another_class_are_framed_where_most_are_of_one(tmp_path: Path) -> None:
    assignments, labels = np.repeat([0, 1], 4), np.array([5, 5, 5, 6, 1, 2, 3, 4])
    clusters = choose_cluster_pictures(
        assignments, np.ones(8), source=make_numbered_images(8), labels=labels, per_cluster=4, seed=0
    )
    is_framed = [[p.is_framed for p in cluster.typical] for cluster in clusters]
    assert is_framed == [[False, False, False, True], [False] * 4]
    page = write_page(tmp_path, clusters)
    assert page.values("img", "class").count("px odd") == 1 and "framed" in page.text
    assert "75 % are “class 5”" in page.text


def test_vectors_have_sizes_and_purities_but_no_pictures(tmp_path: Path) -> None:
    clusters = choose_cluster_pictures(
        np.array([1, 1, 3]), np.ones(3), source=None, labels=np.array([0, 0, 1]), per_cluster=4, seed=0
    )
    page = write_page(tmp_path, clusters)
    assert "img" not in page.tags and page.tags.count("article") == 2
    for part in ("Cluster 1", "100 % are “class 0”", "2 images, 66.7 %", "1 image, 33.3 %"):
        assert part in page.text


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_in_the_page_pixel_by_pixel(tmp_path: Path, channels: int) -> None:
    images = make_noise(6, 8, 8, channels)
    confidence = np.linspace(1, 0, 6)
    clusters = choose_cluster_pictures(
        np.zeros(6, int), confidence, source=ArraySource([images]), per_cluster=2, seed=0
    )
    shown = write_page(tmp_path, clusters).images()
    assert len(shown) == 6
    expected = images.squeeze(3) if channels == 1 else images
    np.testing.assert_array_equal(shown[:2], expected[:2])  # typical, then random, then least certain
    np.testing.assert_array_equal(shown[4:], expected[[5, 4]])
    assert {image.tobytes() for image in shown} == {image.tobytes() for image in expected}


def test_small_images_keep_sharp_edges_and_large_ones_are_made_smaller(tmp_path: Path) -> None:
    for side, is_sharp in ((8, True), (400, False)):
        source = ArraySource([make_noise(3, side, side // 2, 3)])
        clusters = choose_cluster_pictures(np.zeros(3, int), np.ones(3), source=source, per_cluster=1, seed=0)
        page = write_page(tmp_path, clusters)
        assert page.values("img", "class") == ["px"] * (3 * is_sharp)
        assert page.images()[0].shape == ((8, 4, 3) if is_sharp else (224, 112, 3))


@pytest.mark.parametrize(("num_clusters", "shape"), [(10, (224, 224, 3)), (200, (64, 64, 3)), (3000, (32, 32, 3))])
def test_the_page_stays_below_ten_megabytes(tmp_path: Path, num_clusters: int, shape: tuple[int, int, int]) -> None:
    num_images = 24 * num_clusters

    class NoiseSource:
        """Random pixels, which PNG cannot compress."""

        def __init__(self) -> None:
            self.shape = shape

        def __len__(self) -> int:
            return num_images

        def read(self, indices: np.ndarray) -> Any:
            return ArraySource([make_noise(len(indices), *shape)]).read(np.arange(len(indices)))

    assignments = np.arange(num_images) % num_clusters
    clusters = choose_cluster_pictures(assignments, np.ones(num_images), source=NoiseSource(), per_cluster=8, seed=0)
    table = None
    if num_clusters <= 200:
        table = np.random.default_rng(0).integers(0, 50, (num_clusters, num_clusters))
    page = write_page(tmp_path, clusters, results=make_results(num_clusters=num_clusters), contingency_table=table)
    min_size = 0 if num_clusters == 10 else 0.3 * MAX_BYTES  # few clusters are all shown
    assert min_size < (tmp_path / "report.html").stat().st_size < 10_000_000
    assert all(len(cluster.typical) == 8 for cluster in clusters) or num_clusters > 10
    assert (len(clusters) < num_clusters) == ("smaller ones are not shown" in page.text)
