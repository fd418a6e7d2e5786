"""The report: the right images, read back from the page; nothing loaded from elsewhere; text escaped."""

import base64
import io
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepclust.datasets.source import ArraySource
from deepclust.report import PICTURE_BYTES, Sheet, cluster_sheets, write_report

VOID = {"meta", "img", "br", "path", "circle"}
BROWSERS = [name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)]


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
        if self.open and self.open[-1] != "style":
            self.text += f"{data}\n"

    def values(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]

    def images(self) -> list[np.ndarray]:
        uris = [uri.removeprefix("data:image/png;base64,") for uri in self.values("img", "src")]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri, validate=True)))) for uri in uris]


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
    first, second = cluster_sheets(numbered(17), assignments, confidence, per_cluster=3, seed=0)
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
        return pixels(cluster_sheets(source, zeros, np.ones(200), per_cluster=8, seed=seed)[0]["random"])

    assert drawn(0) == drawn(0) != drawn(1)


def test_majority_is_counted_over_known_labels() -> None:
    assignments, confidence = np.array([0, 0, 0, 0, 0, 1, 1]), np.ones(7)
    labels = np.array([1, 1, 0, -1, -1, -1, -1])
    first, second = cluster_sheets(
        numbered(7), assignments, confidence, labels=labels, class_names=["cat", "dog"], per_cluster=1, seed=0
    )
    assert (first["majority"], first["purity"]) == ("dog", 2 / 3)
    assert (second["majority"], second["purity"]) == (None, None)
    bare = cluster_sheets(numbered(7), assignments, confidence, labels=labels, per_cluster=1, seed=0)
    assert bare[0]["majority"] == "class 1"


def test_captions_name_the_image() -> None:
    zeros = np.zeros(2, int)
    (sheet,) = cluster_sheets(numbered(2), zeros, np.array([0.25, 0.5]), per_cluster=2, seed=0)
    assert [p.caption for p in sheet["typical"]] == ["image 1, confidence 0.50", "image 0, confidence 0.25"]
    (sheet,) = cluster_sheets(
        numbered(2), zeros, np.array([0.25, 0.5]), paths=["a.png", "b.png"], per_cluster=2, seed=0
    )
    assert sheet["typical"][0].caption == "b.png, confidence 0.50"


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_in_the_page_pixel_by_pixel(tmp_path: Path, channels: int) -> None:
    images = noise(6, 8, 8, channels)
    confidence = np.linspace(1, 0, 6)
    sheets = cluster_sheets(ArraySource([images]), np.zeros(6, int), confidence, per_cluster=2, seed=0)
    shown = page(tmp_path, sheets).images()
    assert len(shown) == 6
    want = images.squeeze(3) if channels == 1 else images
    np.testing.assert_array_equal(shown[:2], want[:2])  # typical, then random, then least certain
    np.testing.assert_array_equal(shown[4:], want[[5, 4]])
    assert {image.tobytes() for image in shown} == {image.tobytes() for image in want}


def test_small_images_keep_sharp_edges_and_large_ones_are_made_smaller(tmp_path: Path) -> None:
    for side, sharp in ((8, True), (200, False)):
        source = ArraySource([noise(3, side, side // 2, 3)])
        sheets = cluster_sheets(source, np.zeros(3, int), np.ones(3), per_cluster=1, seed=0)
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
    sheets = cluster_sheets(Noise(), assignments, np.ones(24 * clusters), per_cluster=8, seed=0)
    table = np.random.default_rng(0).integers(0, 50, (clusters, clusters)) if clusters <= 200 else None
    found = page(tmp_path, sheets, results=results(num_clusters=clusters), table=table)
    assert 0.3 * PICTURE_BYTES < (tmp_path / "report.html").stat().st_size < 10_000_000
    assert (len(sheets) < clusters) == ("smaller ones are not shown" in found.text)


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    sheets = cluster_sheets(numbered(6), np.zeros(6, int), np.ones(6), per_cluster=2, seed=0)
    found = page(tmp_path, sheets, table=np.eye(3, dtype=int), curves=write_curves(tmp_path))
    text = (tmp_path / "report.html").read_text()
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(found.tags)
    assert all(uri.startswith("data:image/png;base64,") for uri in found.values("img", "src"))
    assert all(link.startswith("#") for link in found.values("a", "href"))
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in found.values("meta", "content")


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    sheets = cluster_sheets(
        numbered(3),
        np.zeros(3, int),
        np.ones(3),
        labels=np.zeros(3, int),
        class_names=[evil],
        paths=[f'"><img src=x>{evil}.png'] * 3,
        per_cluster=1,
        seed=0,
    )
    changed = dict.fromkeys(("method", "dataset", "backbone", "command", "commit"), evil)
    curves = tmp_path / "metrics.csv"
    curves.write_text("step,<script>\n1,0.5\n")
    found = page(
        tmp_path,
        sheets,
        results=results(**changed, versions={evil: evil}, health={**results()["health"], evil: 1}),
        table=np.ones((1, 1), int),
        class_names=[evil],
        curves=curves,
        config_text=evil,
    )
    assert "script" not in found.tags
    assert found.text.count(evil) >= 10
    assert found.tags.count("img") == 3
    assert found.values("img", "title") == [f'"><img src=x>{evil}.png, confidence 1.00'] * 3


def test_a_file_name_that_is_no_text_does_not_stop_the_report(tmp_path: Path) -> None:
    paths = ["caf\udce9.png"]  # how Python reads Latin-1 bytes in a UTF-8 file system
    sheets = cluster_sheets(numbered(1), np.zeros(1, int), np.ones(1), paths=paths, per_cluster=1, seed=0)
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


def write_curves(folder: Path) -> Path:
    file = folder / "metrics.csv"
    lines = ["step,train/loss,eval/method/acc,eval/method/nmi,eval/method/ari,eval/kmeans/acc"]
    lines += [f"{step},{2 - step / 1000},,,," for step in range(1000)]
    lines += ["999,,0.91,0.82,0.73,0.64", "1000,nan,,,,"]
    file.write_text("\n".join(lines) + "\n")
    return file


def test_curves_end_at_the_last_values(tmp_path: Path) -> None:
    found = page(tmp_path, curves=write_curves(tmp_path))
    assert found.tags.count("figure") == 3  # the method's scores share one, k-means, the loss
    for part in ("ACC 91", "NMI 82", "ARI 73", "ACC 64", "train/loss", "epoch"):
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


@pytest.mark.parametrize("browser", BROWSERS[:1])  # none: pytest reports the empty set
def test_a_browser_shows_the_pictures(tmp_path: Path, browser: str) -> None:
    red = np.zeros((4, 8, 8, 3), np.uint8) + np.array([230, 10, 20], np.uint8)
    sheets = cluster_sheets(ArraySource([red]), np.zeros(4, int), np.ones(4), per_cluster=2, seed=0)
    page(tmp_path, sheets)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900"]
    flags += [f"--screenshot={tmp_path / 'shot.png'}", f"file://{tmp_path / 'report.html'}"]
    subprocess.run([browser, *flags], check=True, timeout=60, capture_output=True)
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    shown = np.abs(shot - [230, 10, 20]).max(2) < 8
    assert 4 * 40 * 40 < shown.sum() < shot.shape[0] * shot.shape[1] / 2
