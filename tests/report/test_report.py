"""The report: the right images, read back from the page and in a browser; nothing loaded from elsewhere."""

import base64
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from deepclust.datasets.image_sources import ArraySource, ImageSet, VectorSource
from deepclust.report.cluster_pictures import PICTURE_BYTES, Sheet, cluster_sheets
from deepclust.report.embedding_map import EmbeddingMap, embedding_map, project
from deepclust.report.heatmap import matching
from deepclust.report.page import write_report
from deepclust.report.run_report import find_pictures
from deepclust.report.scatter_plot import COLOURS, SLOTS, SPRITE_BYTES, _centres, _slots, _sprite

VOID = {"meta", "img", "br", "path", "circle", "input"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Page(HTMLParser):
    """Collects what the tests ask for, and checks that elements close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # tag, name, value
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += f"{data}\n"

    def values(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]

    def images(self) -> list[np.ndarray]:
        return [decoded(uri) for uri in self.values("img", "src")]


def decoded(uri: str) -> np.ndarray:
    head, _, text = uri.partition(",")
    assert re.fullmatch("data:image/(png|jpeg);base64", head)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True))))


def results(**changed: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "method": "propos",
        "dataset": "digits",
        "backbone": "conv_small",
        "seed": 0,
        "num_images": 1797,
        "num_clusters": 3,
        "num_classes": 3,
        "scores": {
            "method": {"acc": 0.9, "nmi": 0.8, "ari": 0.7},
            "kmeans": {"acc": 0.85, "nmi": 0.75, "ari": 0.65},
        },
        "health": {"cluster_size_entropy": 0.987, "empty_clusters": 0.0},
        "timing": {
            "train_seconds": 3723.0,
            "images_per_second": 5123.4,
            "e_step_seconds": None,
            "evaluate_seconds": 2.0,
        },
        "peak_memory_bytes": 3 * 2**30,
        "epochs": 10,
        "steps": 100,
        "world_size": 1,
        "command": "deepclust train seed=0",
        "versions": {"torch": "2.11.0"},
        "commit": None,
        **changed,
    }


def page(tmp_path: Path, sheets: list[Sheet] | None = None, **given: Any) -> Page:
    file = tmp_path / "report.html"
    rest = {
        "results": results(),
        "embedding": None,
        "table": None,
        "class_names": None,
        "curves": None,
        "config_text": "seed: 0\n",
    }
    write_report(file, sheets=sheets or [], **{**rest, **given})
    return Page(file.read_text(encoding="utf-8"))


def noise(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def pixels(pictures: list) -> list[int]:
    """What stands in the first pixel: the position of the image, in the sources below."""
    return [int(picture.pixels[0, 0, 0]) for picture in pictures]


def numbered(count: int) -> ArraySource:
    return ArraySource([np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 1))])


def test_sheets_hold_the_extremes_of_each_cluster() -> None:
    assignments = np.array([2] * 12 + [0] * 5)
    confidence = np.concatenate([np.linspace(0.1, 0.9, 12), [0.5] * 5])
    first, second = cluster_sheets(assignments, confidence, source=numbered(17), per_cluster=3, seed=0)
    assert (first["cluster"], first["size"], first["share"]) == (
        2,
        12,
        12 / 17,
    )  # the largest first; 1 is empty
    assert pixels(first["typical"]) == [11, 10, 9]
    assert pixels(first["uncertain"]) == [0, 1, 2]
    assert len(first["random"]) == 3 and set(pixels(first["random"])) <= set(range(3, 9))
    assert (second["cluster"], second["size"]) == (0, 5)
    assert pixels(second["typical"]) == [12, 13, 14]  # of equal ones, the earlier
    assert pixels(second["uncertain"]) == [16, 15] and second["random"] == []  # none is shown twice


def test_random_images_depend_on_the_seed_only() -> None:
    def drawn(seed: int) -> list[int]:
        source, zeros = numbered(200), np.zeros(200, int)
        return pixels(cluster_sheets(zeros, np.ones(200), source=source, per_cluster=8, seed=seed)[0]["random"])

    assert drawn(0) == drawn(0) != drawn(1)


def test_majority_is_counted_over_known_labels() -> None:
    assignments, confidence = np.array([0, 0, 0, 0, 0, 1, 1]), np.ones(7)
    labels = np.array([1, 1, 0, -1, -1, -1, -1])
    first, second = cluster_sheets(
        assignments,
        confidence,
        source=numbered(7),
        labels=labels,
        class_names=["cat", "dog"],
        per_cluster=1,
        seed=0,
    )
    assert (first["majority"], first["purity"]) == ("dog", 2 / 3)
    assert (second["majority"], second["purity"]) == (None, None)
    bare = cluster_sheets(assignments, confidence, source=numbered(7), labels=labels, per_cluster=1, seed=0)
    assert bare[0]["majority"] == "class 1"


def test_captions_name_the_image() -> None:
    zeros = np.zeros(2, int)
    confidence, source = np.array([0.25, 0.5]), numbered(2)
    (sheet,) = cluster_sheets(zeros, confidence, source=source, per_cluster=2, seed=0)
    assert [p.caption for p in sheet["typical"]] == ["image 1, confidence 0.50", "image 0, confidence 0.25"]
    paths, labels = ["a.png", "b.png"], np.array([0, -1])
    (sheet,) = cluster_sheets(zeros, confidence, source=source, labels=labels, paths=paths, per_cluster=2, seed=0)
    assert [p.caption for p in sheet["typical"]] == ["b.png, confidence 0.50", "a.png, confidence 0.25, class 0"]


def test_images_of_another_class_are_framed_where_most_are_of_one(tmp_path: Path) -> None:
    assignments, labels = np.repeat([0, 1], 4), np.array([5, 5, 5, 6, 1, 2, 3, 4])
    sheets = cluster_sheets(assignments, np.ones(8), source=numbered(8), labels=labels, per_cluster=4, seed=0)
    assert [[p.odd for p in sheet["typical"]] for sheet in sheets] == [[False, False, False, True], [False] * 4]
    found = page(tmp_path, sheets)
    assert found.values("img", "class").count("px odd") == 1 and "framed" in found.text
    assert "75 % are “class 5”" in found.text


def test_vectors_have_sizes_and_purities_but_no_pictures(tmp_path: Path) -> None:
    sheets = cluster_sheets(
        np.array([1, 1, 3]), np.ones(3), source=None, labels=np.array([0, 0, 1]), per_cluster=4, seed=0
    )
    found = page(tmp_path, sheets)
    assert "img" not in found.tags and found.tags.count("article") == 2
    for part in ("Cluster 1", "100 % are “class 0”", "2 images, 66.7 %", "1 image, 33.3 %"):
        assert part in found.text


def test_find_pictures_images_are_themselves_and_of_vectors_what_is_given() -> None:
    images, vectors = numbered(2), VectorSource([np.zeros((2, 3), np.float32)])
    assert find_pictures(ImageSet(images, images)) is images
    assert find_pictures(ImageSet(vectors, vectors)) is None
    assert find_pictures(ImageSet(vectors, vectors, pictures=images)) is images


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_in_the_page_pixel_by_pixel(tmp_path: Path, channels: int) -> None:
    images = noise(6, 8, 8, channels)
    confidence = np.linspace(1, 0, 6)
    sheets = cluster_sheets(np.zeros(6, int), confidence, source=ArraySource([images]), per_cluster=2, seed=0)
    shown = page(tmp_path, sheets).images()
    assert len(shown) == 6
    want = images.squeeze(3) if channels == 1 else images
    np.testing.assert_array_equal(shown[:2], want[:2])  # typical, then random, then least certain
    np.testing.assert_array_equal(shown[4:], want[[5, 4]])
    assert {image.tobytes() for image in shown} == {image.tobytes() for image in want}


def test_small_images_keep_sharp_edges_and_large_ones_are_made_smaller(tmp_path: Path) -> None:
    for side, sharp in ((8, True), (200, False)):
        source = ArraySource([noise(3, side, side // 2, 3)])
        sheets = cluster_sheets(np.zeros(3, int), np.ones(3), source=source, per_cluster=1, seed=0)
        found = page(tmp_path, sheets)
        assert found.values("img", "class") == ["px"] * (3 * sharp)
        assert found.images()[0].shape == ((8, 4, 3) if sharp else (96, 48, 3))


@pytest.mark.parametrize(("clusters", "shape"), [(10, (224, 224, 3)), (200, (64, 64, 3)), (3000, (32, 32, 3))])
def test_the_page_stays_below_ten_megabytes(tmp_path: Path, clusters: int, shape: tuple[int, int, int]) -> None:
    class Noise:
        """Random pixels, which PNG cannot make smaller."""

        def __init__(self) -> None:
            self.shape = shape

        def __len__(self) -> int:
            return 24 * clusters

        def read(self, indices: np.ndarray) -> Any:
            return ArraySource([noise(len(indices), *shape)]).read(np.arange(len(indices)))

    assignments = np.arange(24 * clusters) % clusters
    sheets = cluster_sheets(assignments, np.ones(24 * clusters), source=Noise(), per_cluster=8, seed=0)
    table = np.random.default_rng(0).integers(0, 50, (clusters, clusters)) if clusters <= 200 else None
    found = page(tmp_path, sheets, results=results(num_clusters=clusters), table=table)
    enough = 0 if clusters == 10 else 0.3 * PICTURE_BYTES  # of few clusters all is shown
    assert enough < (tmp_path / "report.html").stat().st_size < 10_000_000
    assert all(len(sheet["typical"]) == 8 for sheet in sheets) or clusters > 10
    assert (len(sheets) < clusters) == ("smaller ones are not shown" in found.text)


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    sheets = cluster_sheets(np.zeros(6, int), np.ones(6), source=numbered(6), per_cluster=2, seed=0)
    found = page(tmp_path, sheets, embedding=digits_map(60), table=np.eye(3, dtype=int), curves=write_curves(tmp_path))
    text = (tmp_path / "report.html").read_text()
    assert not {"link", "iframe", "object", "embed", "base"} & set(found.tags)
    assert all(re.match("data:image/(png|jpeg);base64,", uri) for uri in found.values("img", "src"))
    assert all(link.startswith("#") for link in found.values("a", "href"))
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    policy = found.values("meta", "content")[1]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)  # the only one that the browser runs
    assert policy.endswith(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'")
    assert "script" not in page(tmp_path, sheets).tags


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    sheets = cluster_sheets(
        np.zeros(3, int),
        np.ones(3),
        source=numbered(3),
        labels=np.zeros(3, int),
        class_names=[evil],
        paths=[f'"><img src=x>{evil}.png'] * 3,
        per_cluster=1,
        seed=0,
    )
    changed = dict.fromkeys(("method", "dataset", "backbone", "command", "commit"), evil)
    curves = tmp_path / "metrics.csv"
    curves.write_text("step,<script>\n1,0.5\n")
    embedding = embedding_map(
        torch.randn(3, 4),
        np.zeros(3, int),
        np.ones(3),
        source=numbered(3),
        labels=np.zeros(3, int),
        paths=[f"</script>{evil}"] * 3,
        max_points=3,
        seed=0,
    )
    found = page(
        tmp_path,
        sheets,
        embedding=embedding,
        results=results(**changed, versions={evil: evil}, health={**results()["health"], evil: 1}),
        table=np.ones((1, 1), int),
        class_names=[evil],
        curves=curves,
        config_text=evil,
    )
    assert found.tags.count("script") == 2  # the points, and what shows them
    assert found.text.count(evil) >= 10
    assert found.tags.count("img") == 3 + 1  # and the map's
    assert found.values("img", "title") == [f'"><img src=x>{evil}.png, confidence 1.00, {evil}'] * 3


def test_a_file_name_that_is_no_text_does_not_stop_the_report(tmp_path: Path) -> None:
    paths = ["caf\udce9.png"]  # how Python reads Latin-1 bytes in a UTF-8 file system
    sheets = cluster_sheets(np.zeros(1, int), np.ones(1), source=numbered(1), paths=paths, per_cluster=1, seed=0)
    assert page(tmp_path, sheets).values("img", "title") == ["caf?.png, confidence 1.00"]


def test_head_says_the_scores(tmp_path: Path) -> None:
    text = page(tmp_path).text
    for part in ("propos on digits", "90.0", "80.0", "70.0", "in percent, for the method's own rule"):
        assert part in text
    assert "k-means on its features · ACC 85.0 · NMI 75.0 · ARI 65.0" in text
    assert "cluster size entropy 0.987 · empty clusters 0" in text
    pixels = {"kmeans_on_pixels": {"acc": 0.3, "nmi": 0.2, "ari": 0.1}}
    text = page(tmp_path, results=results(baseline=pixels)).text
    assert "k-means on the pixels · ACC 30.0 · NMI 20.0 · ARI 10.0" in text


def test_k_means_stands_in_for_a_method_without_a_rule(tmp_path: Path) -> None:
    scores = {**results()["scores"], "method": None}
    text = page(tmp_path, results=results(scores=scores)).text
    assert "85.0" in text and "in percent, for k-means on its features" in text and "90.0" not in text


@pytest.mark.parametrize("scores", [None, {"method": None, "kmeans": None}])
def test_without_labels_the_head_says_what_can_be_said(tmp_path: Path, scores: dict | None) -> None:
    found = page(tmp_path, results=results(scores=scores, num_classes=None), curves=tmp_path / "missing.csv")
    assert "98.7" in found.text and "without labels" in found.text and "ACC" not in found.text
    assert "0\n empty" in found.text and "of the 3 clusters" in found.text
    assert found.values("a", "href") == ["#Run"]  # no pictures, table or curves were given


def rows_of(found: Page) -> list[str]:
    return found.text.split("shade: share of the cluster")[1].split("Run\n")[0].split()


def test_rows_of_the_table_follow_the_matching(tmp_path: Path) -> None:
    table = np.array([[1, 0, 7, 0], [9, 2, 0, 3]])  # 2 classes in 4 clusters: 2 -> class 0, 0 -> class 1
    found = page(tmp_path, table=table, class_names=["cat", "dog"])
    assert " ".join(rows_of(found)) == "cat dog 2 7 0 1 9 1 2 3 3"  # zeros are left blank
    shades = [style.partition("/")[2] for style in found.values("td", "style")]
    assert shades == ["0.70)", "0.07)", "0.63)", "0.70)", "0.70)"]  # 0.7 times the share of the cluster


def test_a_large_table_is_one_picture(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(60)
    table = np.zeros((60, 60), int)
    table[order, np.arange(60)] = 5  # cluster k holds class order[k] only
    (image,) = page(tmp_path, table=table).images()
    np.testing.assert_array_equal(image[..., 3], 255 * np.eye(60))


def test_a_table_of_unlabelled_images_is_left_out(tmp_path: Path) -> None:
    assert "table" not in page(tmp_path, table=np.zeros((2, 3), int)).tags


def test_matching_leaves_more_clusters_than_classes_unmatched() -> None:
    assert matching(np.array([[1, 0, 7, 0], [9, 2, 0, 3]])).tolist() == [1, 2, 0, 2]
    assert matching(np.array([[1, 0], [0, 5], [9, 0]])).tolist() == [2, 1]


def write_curves(folder: Path) -> Path:
    file = folder / "metrics.csv"
    lines = ["step,train/loss,eval/method/acc,eval/method/nmi,eval/method/ari,eval/kmeans/acc"]
    lines += [f"{step},{2 - step / 1000},,,," for step in range(1000)]
    lines += ["999,,0.91,0.82,0.73,0.64", "1000,nan,,,,"]
    file.write_text("\n".join(lines) + "\n")
    return file


def test_curves_end_in_what_the_run_is_judged_by(tmp_path: Path) -> None:
    found = page(tmp_path, curves=write_curves(tmp_path), results=results(steps=1000))
    assert found.tags.count("figure") == 3  # the method's scores share one, k-means, the loss
    for part in ("ACC 90", "NMI 80", "ARI 70", "ACC 85", "train/loss", "epoch"):
        assert part in found.text
    curve = max(found.values("path", "d"), key=len)
    points = np.array([point.split() for point in curve[1:].split("L")], float)
    assert 200 < len(points) <= 300
    assert np.all(np.diff(points[:, 0]) >= 0) and np.all(np.diff(points[:, 1]) >= 0)  # downwards: y grows
    assert np.isfinite(points).all()


@pytest.mark.parametrize(
    "values",
    [["0.5"], ["0", "0"], ["1e-9", "2e-9"], ["-3", "1e6"], ["nan", "inf"], [], ["1", f"{1 + 1e-15}"]],
)
def test_curves_of_any_values_can_be_drawn(tmp_path: Path, values: list[str]) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,train/x\n" + "".join(f"{step},{value}\n" for step, value in enumerate(values)))
    found = page(tmp_path, curves=file)
    assert found.tags.count("svg") == bool(values and values[0] != "nan")
    for path in found.values("path", "d"):
        assert "nan" not in path and "inf" not in path


def test_a_curve_that_stays_at_0_has_nothing_below_it(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,eval/empty_clusters\n1,0\n2,0\n")
    said = page(tmp_path, curves=file).text.split()
    assert {"0", "0.5", "1"} <= set(said) and "-0.5" not in said


@pytest.mark.parametrize(("values", "ticks"), [(["1", "0.01", "0.00001"], {"1", "0.01"}), (["1", "0", "1e-9"], {"0"})])
def test_curves_over_many_decades_are_logarithmic(tmp_path: Path, values: list[str], ticks: set[str]) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,train/x\n" + "".join(f"{step},{value}\n" for step, value in enumerate(values)))
    found = page(tmp_path, curves=file)
    assert ticks <= set(found.text.split())
    curve = [point.split() for point in found.values("path", "d")[-1][1:].split("L")]
    heights = np.array(curve, float)[:, 1]
    middle = (heights[1] - heights[0]) / (heights[2] - heights[0])
    assert middle == pytest.approx(0.4 if "0" not in values else 1, abs=0.01)  # 2 of 5 decades; linear


def test_run_section_tells_how_it_was_made(tmp_path: Path) -> None:
    text = page(tmp_path, config_text="alpha: 0.123\n").text
    for part in (
        "deepclust train seed=0",
        "1 h 2 min",
        "2.0 s",
        "5,123",
        "3.00 GiB",
        "2.11.0",
        "alpha: 0.123",
    ):
        assert part in text
    assert "commit" not in text and "e step" not in text  # null


def digits_map(count: int, *, labelled: bool = True, **given: Any) -> EmbeddingMap:
    """The first digits, by their pixels, in clusters that are their classes but for every tenth."""
    data = load_digits()
    images = (data.images[:count, :, :, None] * 15).astype(np.uint8)
    clusters = np.where(np.arange(count) % 10 == 9, 0, data.target[:count])
    options: dict[str, Any] = {"source": ArraySource([images]), "max_points": count, "seed": 0}
    options["labels"] = data.target[:count] if labelled else None
    features = torch.from_numpy(data.data[:count])
    shown = embedding_map(features, clusters, np.linspace(0, 1, count), **{**options, **given})
    assert shown is not None
    return shown


def drawn_points(found: Page, name: str) -> list[tuple[int, int, str, str]]:
    """Place, cluster and label of the points of a projection, as the page draws them."""
    values: list[dict[str, str]] = []
    inside = ""
    for tag, key, value in found.attributes:
        if (tag, key) == ("svg", "aria-label"):
            inside = value
        if tag == "path" and inside == name:
            if key == "class":
                values.append({})
            values[-1][key] = value
    return [
        (*map(int, stroke.removesuffix("h0").split()), path["data-k"], path["data-l"])  # type: ignore[misc]
        for path in values
        for stroke in path["d"][1:].split("M")
    ]


def test_every_image_is_a_point_with_its_cluster_and_label(tmp_path: Path) -> None:
    shown = digits_map(60)
    found = page(tmp_path, embedding=shown, table=np.eye(10, dtype=int))
    assert list(shown.places) == ["t-SNE", "principal components"]
    assert "all 60 images" in found.text
    want = sorted(zip(map(str, shown.clusters), map(str, shown.labels), strict=True))  # type: ignore[arg-type]
    for name, places in shown.places.items():
        points = drawn_points(found, name)
        assert sorted(point[2:] for point in points) == want
        at = np.array([point[:2] for point in points], float)
        assert at.min() >= 0 and at[:, 0].max() <= 1000 and at[:, 1].max() <= 800
        order = np.lexsort((shown.labels, shown.clusters))
        moved = at - at.mean(0)
        expected = (places[order] - places.mean(0)) * (1, -1)  # the page counts downwards
        scale = np.linalg.norm(moved) / np.linalg.norm(expected)
        np.testing.assert_allclose(moved, scale * expected, atol=1.5)  # whole units


def test_find_pictures_the_points_stand_in_their_order(tmp_path: Path) -> None:
    shown = digits_map(60)
    found = page(tmp_path, embedding=shown)
    (sheet,) = found.images()
    data = json.loads(re.findall('id="points">(.*?)</script>', (tmp_path / "report.html").read_text())[0])
    assert data["tile"] == {"w": 8, "h": 8, "dx": 8, "dy": 8, "columns": 8, "sharp": True}
    for at, name in enumerate(data["names"]):
        top, left = 8 * (at // 8), 8 * (at % 8)
        row = int(name.removeprefix("image "))
        np.testing.assert_array_equal(sheet[top : top + 8, left : left + 8], shown.pictures[row, :, :, 0])  # type: ignore[index]
        assert data["confidence"][at] == round(row / 59, 3)


def test_the_map_is_the_same_each_time_and_a_sample_of_many() -> None:
    first, again, other = (
        digits_map(200, max_points=50),
        digits_map(200, max_points=50),
        digits_map(200, max_points=50, seed=1),
    )
    assert len(first.rows) == 50 and first.total == 200
    np.testing.assert_array_equal(first.rows, again.rows)
    for name in first.places:
        np.testing.assert_array_equal(first.places[name], again.places[name])
    assert set(first.rows) != set(other.rows)


def test_t_sne_keeps_separate_groups_apart() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(3), 30)
    points = (100 * np.eye(3)[groups] + rng.normal(size=(90, 3))).astype(np.float32)
    for places in project(points, seed=0).values():
        distance = np.linalg.norm(places[:, None] - places[None], axis=2)
        same = groups[:, None] == groups
        assert distance[same].max() < distance[~same].min()


def test_principal_components_are_those_of_a_singular_value_decomposition() -> None:
    points = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32) * [9, 5, 1, 1, 1, 1]
    found = project(points.astype(np.float32), seed=0)["principal components"]
    left, values, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    want = left[:, :2] * values[:2]
    cosine = (found * want).sum(0) / np.linalg.norm(found, axis=0) / np.linalg.norm(want, axis=0)
    np.testing.assert_allclose(np.abs(cosine), 1, atol=1e-5)


@pytest.mark.parametrize("features", [np.zeros((1, 4)), np.ones((50, 4)), np.eye(3), np.arange(40)[:, None]])
def test_maps_of_too_little_can_be_drawn(tmp_path: Path, features: np.ndarray) -> None:
    count = len(features)
    zeros = np.zeros(count, int)
    shown = embedding_map(
        torch.from_numpy(features), zeros, np.ones(count), source=numbered(count), max_points=100, seed=0
    )
    assert shown is not None
    assert all(np.isfinite(places).all() for places in shown.places.values())
    assert len(drawn_points(page(tmp_path, embedding=shown), "principal components")) == count


def test_features_that_are_no_numbers_are_left_out() -> None:
    features = torch.randn(20, 4)
    features[3, 2] = torch.nan
    shown = embedding_map(features, np.zeros(20, int), np.ones(20), source=None, max_points=100, seed=0)
    assert shown is not None and shown.rows.tolist() == [i for i in range(20) if i != 3]
    none = embedding_map(features * torch.nan, np.zeros(20, int), np.ones(20), source=None, max_points=100, seed=0)
    assert none is None
    assert embedding_map(features, np.zeros(20, int), np.ones(20), source=None, max_points=0, seed=0) is None


def test_colours_repeat_far_from_each_other_only() -> None:
    few = {group: np.array([group, 0.0]) for group in range(10)}
    assert sorted(_slots(few, {})) == list(range(10)) and len(set(_slots(few, {}).values())) == 10
    rng = np.random.default_rng(0)
    many = dict(enumerate(rng.uniform(size=(200, 2))))
    slots = _slots(many, {3: 7})
    assert slots[3] == 7 and set(slots.values()) == set(range(SLOTS))
    for group, place in many.items():
        distance = {other: np.linalg.norm(at - place) for other, at in many.items()}
        assert slots[group] not in [slots[other] for other in sorted(distance, key=distance.__getitem__)[1:4]]


def test_a_class_has_the_colour_of_its_matched_cluster(tmp_path: Path) -> None:
    shown = digits_map(60, labels=np.roll(np.arange(60) % 3, 1))
    clusters = np.arange(60) % 3
    shown = EmbeddingMap(**{**vars(shown), "clusters": clusters})
    table = np.zeros((3, 3), int)
    np.add.at(table, (shown.labels, clusters), 1)
    kinds = [kind.split() for kind in page(tmp_path, embedding=shown, table=table).values("path", "class")]
    assert kinds and all(cluster[1:] == label[1:] for cluster, label in kinds)


def test_the_name_of_a_group_in_pieces_stands_in_one_of_them():
    pieces = np.array([[0, 0], [2, 0], [0, 2], [90, 0], [91, 0], [0, 90], [50, 50]])
    centres = _centres(pieces, np.array([3, 3, 3, 3, 3, 3, -1]))
    assert list(centres) == [3] and centres[3].tolist() in pieces[:3].tolist()


def test_find_pictures_the_map_keep_to_their_size() -> None:
    uri, tile = _sprite(noise(600, 64, 64, 3))
    assert SPRITE_BYTES / 4 < len(uri) <= SPRITE_BYTES and 16 <= tile["w"] < 64
    smooth = np.broadcast_to(np.linspace(0, 255, 60, dtype=np.uint8)[:, None, None], (100, 60, 40, 3))
    uri, tile = _sprite(smooth)
    assert tile == {"w": 40, "h": 60, "dx": 40, "dy": 64, "columns": 10, "sharp": False}
    shown = decoded(uri).astype(int)
    assert shown.shape == (640, 400, 3)
    assert np.abs(shown[64 * 3 : 64 * 3 + 60, 80:120] - smooth[0]).max() < 12


def test_the_command_line_does_not_load_what_the_report_needs() -> None:
    code = "import sys, deepclust.cli.main; print({'torch', 'sklearn', 'PIL', 'deepclust.report'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


class Browser:
    """A headless browser, spoken to through two pipes by its debugging protocol."""

    def __init__(self, program: str, profile: Path) -> None:
        their_input, our_output = os.pipe()
        our_input, their_output = os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (their_input, their_output)]
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-extensions",
        ]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        actions = [(os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(theirs, (3, 4), strict=True)]
        actions += [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]  # type: ignore[list-item]
        self.process = os.posix_spawn(program, [program, *flags], os.environ, file_actions=actions)
        for end in (their_input, their_output, *theirs):
            os.close(end)
        self.output, self.input = os.fdopen(our_output, "wb", 0), os.fdopen(our_input, "rb", 0)
        self.asked, self.rest, self.events = 0, b"", list[dict[str, Any]]()

    def ask(self, method: str, session: str | None = None, **given: Any) -> dict[str, Any]:
        self.asked += 1
        said = {"id": self.asked, "method": method, "params": given}
        self.output.write(json.dumps(said | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self.hear()).get("id") != self.asked:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def hear(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            heard = self.input.read(1 << 20)
            assert heard, "the browser has gone"
            self.rest += heard
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def close(self) -> None:
        self.ask("Browser.close")
        os.waitpid(self.process, 0)
        self.output.close()
        self.input.close()


class Tab:
    """A page in the browser; what it complains of is an error."""

    def __init__(self, browser: Browser, file: Path, *, width: int, script: bool = True) -> None:
        self.browser = browser
        browser.events.clear()
        self.target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.ask("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        self.ask("Emulation.setScriptExecutionDisabled", value=not script)
        self.ask("Page.navigate", url=file.as_uri())
        while "Page.loadEventFired" not in [event.get("method") for event in browser.events]:
            browser.events.append(browser.hear())

    def ask(self, method: str, **given: Any) -> dict[str, Any]:
        return self.browser.ask(method, self.session, **given)

    def run(self, code: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def shot(self) -> np.ndarray:
        data = self.ask("Page.captureScreenshot")["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)

    def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def close(self) -> None:
        bad = [e for e in self.browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
        bad += [e for e in self.browser.events if e["method"] == "Runtime.consoleAPICalled"]
        assert not bad, bad
        self.browser.ask("Target.closeTarget", targetId=self.target)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def digits_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report of 120 digits, 10 clusters and one empty one."""
    folder = tmp_path_factory.mktemp("digits")
    shown = digits_map(120)
    assert shown.labels is not None and shown.pictures is not None
    options: dict[str, Any] = {"labels": shown.labels, "per_cluster": 4, "seed": 0}
    sheets = cluster_sheets(shown.clusters, shown.confidence, source=ArraySource([shown.pictures]), **options)
    table = np.zeros((10, 11), int)
    np.add.at(table, (shown.labels, shown.clusters), 1)
    page(folder, sheets, embedding=shown, table=table, curves=write_curves(folder), results=results(num_clusters=11))
    return folder / "report.html"


PLACE = """(() => {
  const stage = document.querySelector('.stage');
  stage.scrollIntoView({block: 'center'});
  const svg = [...stage.querySelectorAll('svg')].find(svg => svg.getClientRects().length);
  const box = svg.getBoundingClientRect(), path = svg.querySelector('path');
  const [x, y] = path.getAttribute('d').slice(1).split(' ').map(parseFloat);
  return [box.left + x * box.width / 1000, box.top + y * box.width / 1000, path.dataset.k, path.dataset.l];
})()"""
TIP = "document.querySelector('.tip').hidden ? null : document.querySelector('.tip').innerText"
WIDE = "document.documentElement.scrollWidth"


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_everything(browser: Browser, digits_page: Path, width: int) -> None:
    tab = Tab(browser, digits_page, width=width)
    assert tab.run(WIDE) <= width
    whole = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
    assert tab.run(f"{whole} && document.images.length") > 10 * 4
    assert tab.run("document.querySelectorAll('section').length") == 5
    tab.close()


def test_pointing_at_a_point_shows_its_image(browser: Browser, digits_page: Path) -> None:
    tab = Tab(browser, digits_page, width=1280)
    x, y, cluster, label = tab.run(PLACE)
    assert tab.run(TIP) is None
    tab.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    said = tab.run(TIP).split("\n")
    assert said[0] == f"cluster {cluster}" and said[2] == f"label: class {label}"
    row = int(said[3].removeprefix("image "))
    assert said[1] == f"confidence {row / 119:.2f}"
    drawn = tab.run(
        "(c => [...c.getContext('2d').getImageData(0, 0, 96, 96).data])(document.querySelector('.tip canvas'))"
    )
    want = (load_digits().images[row] * 15).astype(np.uint8)
    np.testing.assert_array_equal(np.array(drawn).reshape(96, 96, 4)[6::12, 6::12, 0], want)
    tab.ask("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert tab.run(TIP) is None
    tab.close()


def test_pointing_at_the_legend_brings_its_points_out(browser: Browser, digits_page: Path) -> None:
    tab = Tab(browser, digits_page, width=1280)
    for kind, switch in (("k", "colour0"), ("l", "colour1")):
        tab.run(f"document.getElementById('{switch}').click()")
        tab.run(f"document.querySelector('.legend.by-{kind}').scrollIntoView({{block: 'center'}})")
        chip = f"""document.querySelector('[data-{kind}="3"]:not(path)')"""
        x, y = tab.run(f"(b => [b.left + 5, b.top + 5])({chip}.getBoundingClientRect())")
        tab.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        assert tab.run("document.querySelector('.stage').classList.contains('faded')")
        assert set(tab.run(f"[...document.querySelectorAll('.stage .lit')].map(path => path.dataset.{kind})")) == {"3"}
        tab.ask("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
        assert not tab.run("document.querySelector('.stage').classList.contains('faded')")
    tab.close()


def test_a_tap_shows_the_image_within_the_screen(browser: Browser, digits_page: Path) -> None:
    tab = Tab(browser, digits_page, width=390)
    tab.ask("Emulation.setTouchEmulationEnabled", enabled=True)
    x, y, cluster, _ = tab.run(PLACE)
    tab.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    tab.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert tab.run(TIP).startswith(f"cluster {cluster}")
    left, right = tab.run("(b => [b.left, b.right])(document.querySelector('.tip').getBoundingClientRect())")
    assert 0 <= left < right <= 390 and tab.run(WIDE) == 390
    tab.close()


def test_arrow_keys_go_from_image_to_image(browser: Browser, digits_page: Path) -> None:
    tab = Tab(browser, digits_page, width=1280)
    ring = "[...document.querySelectorAll('.p0 .ring')].map(r => [r.cx.baseVal.value, r.cy.baseVal.value])[0]"
    tab.run("document.querySelector('.legend').previousElementSibling.focus()")
    tab.key("ArrowRight")
    assert tab.run(TIP) is not None
    tab.key("ArrowLeft")
    x, _ = tab.run(ring)
    tab.key("ArrowRight")
    assert tab.run(ring)[0] > x
    y = tab.run(ring)[1]
    tab.key("ArrowUp")
    assert tab.run(ring)[1] < y
    tab.key("Escape")
    assert tab.run(TIP) is None
    tab.close()


@pytest.mark.parametrize("script", [True, False])
def test_the_map_shows_with_and_without_a_script(browser: Browser, digits_page: Path, script: bool) -> None:
    def colours(shot: np.ndarray) -> list[int]:
        wanted = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in COLOURS]
        return [int((np.abs(shot - colour).max(2) < 4).sum()) for colour in wanted]

    tab = Tab(browser, digits_page, width=1000, script=script)
    if script:
        tab.run(PLACE)
    else:
        tab.ask("DOM.enable")
        root = tab.ask("DOM.getDocument")["root"]["nodeId"]
        stage = tab.ask("DOM.querySelector", nodeId=root, selector=".stage")["nodeId"]
        tab.ask("DOM.scrollIntoViewIfNeeded", nodeId=stage)
    before = colours(tab.shot())
    assert min(before) > 100
    if script:
        tab.run("document.getElementById('colour1').click()")
        after = colours(tab.shot())
        assert after != before and min(after) > 100
        tab.run("document.getElementById('place1').click()")
        assert tab.run("document.querySelector('.p0').getClientRects().length") == 0
        assert tab.run("document.querySelector('.p1').getClientRects().length") == 1
    tab.close()


def test_it_prints(browser: Browser, digits_page: Path) -> None:
    tab = Tab(browser, digits_page, width=1280)
    pdf = base64.b64decode(tab.ask("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type /Page\b", pdf)) <= 12
    tab.ask("Emulation.setEmulatedMedia", media="print")
    tab.ask("Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1, mobile=False)
    assert tab.run(WIDE) <= 718
    edges = "[...document.querySelectorAll('article')].map(card => card.getBoundingClientRect().right)"
    assert abs(tab.run(f"Math.max(...{edges}) - document.documentElement.clientWidth")) < 1
    tab.run("document.querySelector('details pre').textContent = 'trainer: 1\\n'.repeat(250)")
    assert 0 < tab.run("document.querySelector('details pre').offsetHeight") < 1000  # a page
    tab.close()


@pytest.mark.parametrize(
    ("clusters", "labelled", "kind"),
    [(1, True, "image"), (200, True, "image"), (3, False, "image"), (3, True, "vector")],
)
def test_a_browser_shows_reports_of_every_kind(
    browser: Browser, tmp_path: Path, clusters: int, labelled: bool, kind: str
) -> None:
    count = 400
    rng = np.random.default_rng(0)
    assignments = np.arange(count) % clusters
    source = ArraySource([noise(count, 12, 20, 3)]) if kind == "image" else None
    options: dict[str, Any] = {"source": source, "labels": rng.integers(0, 100, count) if labelled else None, "seed": 0}
    sheets = cluster_sheets(assignments, rng.random(count), per_cluster=2, **options)
    features = torch.from_numpy(rng.normal(size=(count, 8)))
    shown = embedding_map(features, assignments, rng.random(count), max_points=150, **options)
    table = rng.integers(0, 9, (100, clusters)) if labelled else None
    scores = results()["scores"] if labelled else None
    page(tmp_path, sheets, embedding=shown, table=table, results=results(scores=scores, num_clusters=clusters + 2))
    tab = Tab(browser, tmp_path / "report.html", width=390)
    assert tab.run(WIDE) == 390
    assert tab.run("[...document.images].every(image => image.naturalWidth > 0)")
    assert tab.run("document.querySelectorAll('article').length") == clusters
    assert tab.run("!!document.getElementById('colour1')") == labelled
    x, y, cluster, _ = tab.run(PLACE)
    tab.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    said = tab.run(TIP)
    assert said.startswith(f"cluster {cluster}") and ("label: " in said) == labelled
    assert tab.run("document.querySelector('.tip canvas').hidden") == (kind == "vector")
    assert (tmp_path / "report.html").stat().st_size < 10_000_000
    tab.close()
