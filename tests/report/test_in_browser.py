"""The report in a browser: everything shows, the map answers to mouse, finger and keys, and the page prints."""

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from deepclust.datasets.image_sources import ArraySource
from deepclust.report.cluster_pictures import choose_cluster_pictures
from deepclust.report.embedding_map import compute_embedding_map
from deepclust.report.scatter_plot import COLOURS
from deepclust.report.tabs import join_reports
from tests.report.browser import Browser, Tab
from tests.report.pages import make_digits_map, make_noise, make_results, write_metrics, write_page

# Scrolls to the map; gives the first point's place on the screen, its cluster and its label.
FIRST_POINT = """(() => {
  const stage = document.querySelector('.stage');
  stage.scrollIntoView({block: 'center'});
  const svg = [...stage.querySelectorAll('svg')].find(svg => svg.getClientRects().length);
  const box = svg.getBoundingClientRect(), path = svg.querySelector('path');
  const [x, y] = path.getAttribute('d').slice(1).split(' ').map(parseFloat);
  return [box.left + x * box.width / 1000, box.top + y * box.width / 1000, path.dataset.k, path.dataset.l];
})()"""
TIP_TEXT = "document.querySelector('.tip').hidden ? null : document.querySelector('.tip').innerText"
PAGE_WIDTH = "document.documentElement.scrollWidth"


@pytest.fixture(scope="module")
def digits_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report of 120 digits in 10 clusters, with one more cluster that is empty."""
    folder = tmp_path_factory.mktemp("digits")
    embedding = make_digits_map(120)
    assert embedding.labels is not None and embedding.pictures is not None
    clusters = choose_cluster_pictures(
        embedding.assignments,
        embedding.confidence,
        source=ArraySource([embedding.pictures]),
        labels=embedding.labels,
        per_cluster=4,
        seed=0,
    )
    table = np.zeros((10, 11), int)
    np.add.at(table, (embedding.labels, embedding.assignments), 1)
    write_page(
        folder,
        clusters,
        embedding=embedding,
        contingency_table=table,
        metrics_file=write_metrics(folder),
        results=make_results(num_clusters=11),
    )
    return folder / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_everything(browser: Browser, digits_page: Path, width: int) -> None:
    tab = Tab(browser, digits_page, width=width)
    assert tab.evaluate(PAGE_WIDTH) <= width
    all_loaded = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
    assert tab.evaluate(f"{all_loaded} && document.images.length") > 10 * 4
    assert tab.evaluate("document.querySelectorAll('section').length") == 5
    tab.close()


def test_pointing_at_a_point_shows_its_image(browser: Browser, digits_page: Path) -> None:
    tab = Tab(browser, digits_page, width=1280)
    x, y, cluster, label = tab.evaluate(FIRST_POINT)
    assert tab.evaluate(TIP_TEXT) is None
    tab.move_mouse(x, y)
    lines = tab.evaluate(TIP_TEXT).split("\n")
    assert lines[0] == f"cluster {cluster}" and lines[2] == f"label: class {label}"
    index = int(lines[3].removeprefix("image "))
    assert lines[1] == f"confidence {index / 119:.2f}"
    pixels = tab.evaluate(
        "(c => [...c.getContext('2d').getImageData(0, 0, 96, 96).data])(document.querySelector('.tip canvas'))"
    )
    expected = (load_digits().images[index] * 15).astype(np.uint8)
    np.testing.assert_array_equal(np.array(pixels).reshape(96, 96, 4)[6::12, 6::12, 0], expected)
    tab.move_mouse(2, 2)
    assert tab.evaluate(TIP_TEXT) is None
    tab.close()


def test_pointing_at_the_legend_brings_its_points_out(browser: Browser, digits_page: Path) -> None:
    tab = Tab(browser, digits_page, width=1280)
    for kind, button in (("k", "colour0"), ("l", "colour1")):
        tab.evaluate(f"document.getElementById('{button}').click()")
        tab.evaluate(f"document.querySelector('.legend.by-{kind}').scrollIntoView({{block: 'center'}})")
        entry = f"""document.querySelector('[data-{kind}="3"]:not(path)')"""
        x, y = tab.evaluate(f"(b => [b.left + 5, b.top + 5])({entry}.getBoundingClientRect())")
        tab.move_mouse(x, y)
        assert tab.evaluate("document.querySelector('.stage').classList.contains('faded')")
        lit = tab.evaluate(f"[...document.querySelectorAll('.stage .lit')].map(path => path.dataset.{kind})")
        assert set(lit) == {"3"}
        tab.move_mouse(2, 2)
        assert not tab.evaluate("document.querySelector('.stage').classList.contains('faded')")
    tab.close()


def test_a_tap_shows_the_image_within_the_screen(browser: Browser, digits_page: Path) -> None:
    tab = Tab(browser, digits_page, width=390)
    tab.send("Emulation.setTouchEmulationEnabled", enabled=True)
    x, y, cluster, _ = tab.evaluate(FIRST_POINT)
    tab.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    tab.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert tab.evaluate(TIP_TEXT).startswith(f"cluster {cluster}")
    left, right = tab.evaluate("(b => [b.left, b.right])(document.querySelector('.tip').getBoundingClientRect())")
    assert 0 <= left < right <= 390 and tab.evaluate(PAGE_WIDTH) == 390
    tab.close()


def test_arrow_keys_go_from_image_to_image(browser: Browser, digits_page: Path) -> None:
    tab = Tab(browser, digits_page, width=1280)
    ring = "[...document.querySelectorAll('.p0 .ring')].map(r => [r.cx.baseVal.value, r.cy.baseVal.value])[0]"
    tab.evaluate("document.querySelector('.legend').previousElementSibling.focus()")
    tab.press_key("ArrowRight")
    assert tab.evaluate(TIP_TEXT) is not None
    tab.press_key("ArrowLeft")
    x, _ = tab.evaluate(ring)
    tab.press_key("ArrowRight")
    assert tab.evaluate(ring)[0] > x
    y = tab.evaluate(ring)[1]
    tab.press_key("ArrowUp")
    assert tab.evaluate(ring)[1] < y
    tab.press_key("Escape")
    assert tab.evaluate(TIP_TEXT) is None
    tab.close()


@pytest.mark.parametrize("runs_scripts", [True, False])
def test_the_map_shows_with_and_without_scripts(browser: Browser, digits_page: Path, runs_scripts: bool) -> None:
    def count_pixels(screenshot: np.ndarray) -> list[int]:
        """Return the number of pixels of each colour of the markers."""
        colours = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in COLOURS]
        return [int((np.abs(screenshot - colour).max(2) < 4).sum()) for colour in colours]

    tab = Tab(browser, digits_page, width=1000, runs_scripts=runs_scripts)
    if runs_scripts:
        tab.evaluate(FIRST_POINT)
    else:
        tab.send("DOM.enable")
        root = tab.send("DOM.getDocument")["root"]["nodeId"]
        stage = tab.send("DOM.querySelector", nodeId=root, selector=".stage")["nodeId"]
        tab.send("DOM.scrollIntoViewIfNeeded", nodeId=stage)
    by_cluster = count_pixels(tab.take_screenshot())
    assert min(by_cluster) > 100
    if runs_scripts:
        tab.evaluate("document.getElementById('colour1').click()")
        by_label = count_pixels(tab.take_screenshot())
        assert by_label != by_cluster and min(by_label) > 100
        tab.evaluate("document.getElementById('place1').click()")
        assert tab.evaluate("document.querySelector('.p0').getClientRects().length") == 0
        assert tab.evaluate("document.querySelector('.p1').getClientRects().length") == 1
    tab.close()


def test_it_prints(browser: Browser, digits_page: Path) -> None:
    tab = Tab(browser, digits_page, width=1280)
    pdf = base64.b64decode(tab.send("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type /Page\b", pdf)) <= 12
    tab.send("Emulation.setEmulatedMedia", media="print")
    tab.send("Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1, mobile=False)
    assert tab.evaluate(PAGE_WIDTH) <= 718
    edges = "[...document.querySelectorAll('article')].map(card => card.getBoundingClientRect().right)"
    assert abs(tab.evaluate(f"Math.max(...{edges}) - document.documentElement.clientWidth")) < 1
    tab.evaluate("document.querySelector('details pre').textContent = 'trainer: 1\\n'.repeat(250)")
    assert 0 < tab.evaluate("document.querySelector('details pre').offsetHeight") < 1000  # a page
    tab.close()


def test_tabs_fit_a_narrow_screen_and_print_one_after_the_other(
    browser: Browser, digits_page: Path, tmp_path: Path
) -> None:
    def count_printed_pages(tab: Tab) -> int:
        return len(re.findall(rb"/Type /Page\b", base64.b64decode(tab.send("Page.printToPDF")["data"])))

    report = digits_page.read_text(encoding="utf-8")
    pages = {f"{k} clusters": (report, f"numbers/{k}/") for k in (5, 10, 20)}
    (tmp_path / "report.html").write_text(join_reports(pages, title="digits"), encoding="utf-8")
    alone = Tab(browser, digits_page, width=390)
    num_pages = count_printed_pages(alone)
    alone.close()
    tab = Tab(browser, tmp_path / "report.html", width=390)
    assert tab.evaluate(PAGE_WIDTH) == 390
    last_label, shown = "[...document.querySelectorAll('label')].at(-1)", "document.querySelector('iframe')"
    assert tab.evaluate(f"{last_label}.getBoundingClientRect().right") <= 390
    assert tab.evaluate(f"{shown}.clientWidth") == 390
    assert tab.evaluate(f"{shown}.getBoundingClientRect().bottom") == tab.evaluate("innerHeight")
    assert count_printed_pages(tab) == 3 * num_pages
    assert tab.evaluate(f"{shown}.clientWidth") == 390 and tab.evaluate("document.body.children.length") == 2
    tab.close()


@pytest.mark.parametrize(
    ("num_clusters", "has_labels", "has_pictures"),
    [(1, True, True), (200, True, True), (3, False, True), (3, True, False)],
)
def test_a_browser_shows_reports_of_every_kind(
    browser: Browser, tmp_path: Path, num_clusters: int, has_labels: bool, has_pictures: bool
) -> None:
    count = 400
    rng = np.random.default_rng(0)
    assignments = np.arange(count) % num_clusters
    options: dict[str, Any] = {
        "source": ArraySource([make_noise(count, 12, 20, 3)]) if has_pictures else None,
        "labels": rng.integers(0, 100, count) if has_labels else None,
        "seed": 0,
    }
    clusters = choose_cluster_pictures(assignments, rng.random(count), per_cluster=2, **options)
    features = torch.from_numpy(rng.normal(size=(count, 8)))
    embedding = compute_embedding_map(features, assignments, rng.random(count), max_points=150, **options)
    write_page(
        tmp_path,
        clusters,
        embedding=embedding,
        contingency_table=rng.integers(0, 9, (100, num_clusters)) if has_labels else None,
        results=make_results(
            scores=make_results()["scores"] if has_labels else None,
            num_clusters=num_clusters + 2,
        ),
    )
    tab = Tab(browser, tmp_path / "report.html", width=390)
    assert tab.evaluate(PAGE_WIDTH) == 390
    assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert tab.evaluate("document.querySelectorAll('article').length") == num_clusters
    assert tab.evaluate("!!document.getElementById('colour1')") == has_labels
    x, y, cluster, _ = tab.evaluate(FIRST_POINT)
    tab.move_mouse(x, y)
    text = tab.evaluate(TIP_TEXT)
    assert text.startswith(f"cluster {cluster}") and ("label: " in text) == has_labels
    assert tab.evaluate("document.querySelector('.tip canvas').hidden") == (not has_pictures)
    assert (tmp_path / "report.html").stat().st_size < 10_000_000
    tab.close()
