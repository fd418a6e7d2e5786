"""The map in the page: its points, colours, names and pictures."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust.report.embedding_map import compute_embedding_map
from deepclust.report.scatter_plot import (
    MAX_SPRITE_BYTES,
    NUM_MARKERS,
    PICTURE_SIDES,
    _choose_markers,
    _find_medoids,
)
from deepclust.report.sprites import make_sprite
from tests.report.pages import Page, decode_image, make_digits_map, make_noise, make_numbered_images, write_page


def read_points(page: Page, projection: str) -> list[tuple[int, int, str, str]]:
    """Return x, y, cluster and label of the points of a projection, as the page draws them."""
    paths: list[dict[str, str]] = []
    drawing = ""
    for tag, name, value in page.attributes:
        if (tag, name) == ("svg", "aria-label"):
            drawing = value
        if tag == "path" and drawing == projection:
            if name == "class":
                paths.append({})
            paths[-1][name] = value
    return [
        (*map(int, stroke.removesuffix("h0").split()), path["data-k"], path["data-l"])  # type: ignore[misc]
        for path in paths
        for stroke in path["d"][1:].split("M")
    ]


def test_every_image_is_a_point_with_its_cluster_and_label(tmp_path: Path) -> None:
    embedding = make_digits_map(60)
    assert embedding.labels is not None
    page = write_page(tmp_path, embedding=embedding, contingency_table=np.eye(10, dtype=int))
    assert list(embedding.projections) == ["t-SNE", "principal components"]
    assert "all 60 images" in page.text
    pairs = sorted(zip(map(str, embedding.assignments), map(str, embedding.labels), strict=True))
    for name, projected in embedding.projections.items():
        points = read_points(page, name)
        assert sorted(point[2:] for point in points) == pairs
        drawn = np.array([point[:2] for point in points], float)
        assert drawn.min() >= 0 and drawn[:, 0].max() <= 1000 and drawn[:, 1].max() <= 800
        order = np.lexsort((embedding.labels, embedding.assignments))
        centred = drawn - drawn.mean(0)
        expected = (projected[order] - projected.mean(0)) * (1, -1)  # y of the page grows downwards
        scale = np.linalg.norm(centred) / np.linalg.norm(expected)
        np.testing.assert_allclose(centred, scale * expected, atol=1.5)  # the page rounds to whole units


def test_pictures_are_in_the_order_of_the_points(tmp_path: Path) -> None:
    embedding = make_digits_map(60)
    assert embedding.pictures is not None
    (sprite,) = write_page(tmp_path, embedding=embedding).images()
    data = json.loads(re.findall('id="points">(.*?)</script>', (tmp_path / "report.html").read_text())[0])
    assert data["tile"] == {"w": 8, "h": 8, "dx": 8, "dy": 8, "columns": 8, "sharp": True}
    for position, name in enumerate(data["names"]):
        top, left = 8 * (position // 8), 8 * (position % 8)
        index = int(name.removeprefix("image "))
        np.testing.assert_array_equal(sprite[top : top + 8, left : left + 8], embedding.pictures[index, :, :, 0])
        assert data["confidence"][position] == round(index / 59, 3)


@pytest.mark.parametrize("features", [np.zeros((1, 4)), np.ones((50, 4)), np.eye(3), np.arange(40)[:, None]])
def test_maps_of_few_or_equal_points_can_be_drawn(tmp_path: Path, features: np.ndarray) -> None:
    count = len(features)
    embedding = compute_embedding_map(
        torch.from_numpy(features),
        np.zeros(count, int),
        np.ones(count),
        source=make_numbered_images(count),
        max_points=100,
        seed=0,
    )
    assert embedding is not None
    assert all(np.isfinite(projected).all() for projected in embedding.projections.values())
    assert len(read_points(write_page(tmp_path, embedding=embedding), "principal components")) == count


def test_only_groups_that_are_far_apart_share_a_colour() -> None:
    few = {group: np.array([group, 0.0]) for group in range(10)}
    markers = _choose_markers(few, {})
    assert sorted(markers) == list(range(10)) and len(set(markers.values())) == 10
    rng = np.random.default_rng(0)
    many = dict(enumerate(rng.uniform(size=(200, 2))))
    markers = _choose_markers(many, {3: 7})
    assert markers[3] == 7 and set(markers.values()) == set(range(NUM_MARKERS))
    for group, centre in many.items():
        distance = {other: np.linalg.norm(other_centre - centre) for other, other_centre in many.items()}
        three_nearest = sorted(distance, key=distance.__getitem__)[1:4]
        assert markers[group] not in [markers[other] for other in three_nearest]


def test_a_class_has_the_colour_of_its_matched_cluster(tmp_path: Path) -> None:
    labels, assignments = np.roll(np.arange(60) % 3, 1), np.arange(60) % 3
    embedding = dataclasses.replace(make_digits_map(60, labels=labels), assignments=assignments)
    table = np.zeros((3, 3), int)
    np.add.at(table, (labels, assignments), 1)
    page = write_page(tmp_path, embedding=embedding, contingency_table=table)
    css_classes = [value.split() for value in page.values("path", "class")]
    assert css_classes and all(cluster[1:] == label[1:] for cluster, label in css_classes)


def test_the_name_of_a_group_in_pieces_stands_in_one_of_them() -> None:
    points = np.array([[0, 0], [2, 0], [0, 2], [90, 0], [91, 0], [0, 90], [50, 50]])
    medoids = _find_medoids(points, np.array([3, 3, 3, 3, 3, 3, -1]))
    assert list(medoids) == [3] and medoids[3].tolist() in points[:3].tolist()


@pytest.mark.parametrize(("count", "distance"), [(20, 24), (120, 0)])
def test_names_hide_no_marker_where_there_are_few(tmp_path: Path, count: int, distance: int) -> None:
    page = write_page(tmp_path, embedding=make_digits_map(count))
    names = list(zip(map(int, page.values("text", "x")), map(int, page.values("text", "y")), strict=True))
    points = {point[:2] for name in ("t-SNE", "principal components") for point in read_points(page, name)}
    assert names and all({(x, y - distance), (x, y + distance)} & points for x, y in names)
    assert min(y for _, y in names) >= 24


def test_pictures_of_the_map_keep_to_their_size() -> None:
    limits = {"sides": PICTURE_SIDES, "max_bytes": MAX_SPRITE_BYTES}
    uri, tile = make_sprite(make_noise(600, 64, 64, 3), **limits)
    assert MAX_SPRITE_BYTES / 4 < len(uri) <= MAX_SPRITE_BYTES and 16 <= tile["w"] < 64
    gradient = np.broadcast_to(np.linspace(0, 255, 60, dtype=np.uint8)[:, None, None], (100, 60, 40, 3))
    uri, tile = make_sprite(gradient, **limits)
    assert tile == {"w": 40, "h": 60, "dx": 40, "dy": 64, "columns": 10, "sharp": False}
    sprite = decode_image(uri).astype(int)
    assert sprite.shape == (640, 400, 3)
    assert np.abs(sprite[64 * 3 : 64 * 3 + 60, 80:120] - gradient[0]).max() < 12
