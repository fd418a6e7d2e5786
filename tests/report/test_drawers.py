"""Drawers with all images, and what is found beside the clusters, as they stand in the page."""

import json
from pathlib import Path

import numpy as np
import pytest

from deepclust.clustering.merge_order import Merge
from deepclust.datasets.image_sources import ArraySource
from deepclust.report import drawers as drawers_module
from deepclust.report.cluster_pictures import choose_cluster_pictures
from deepclust.report.drawers import render_drawers
from deepclust.report.findings import Findings
from deepclust.report.findings_sections import choose_finding_pictures, render_tree
from tests.report.browser import Browser, Tab
from tests.report.pages import Page, decode_image, make_noise, make_numbered_images, make_results, write_page

RESULTS = make_results(
    scores=None,
    num_images=40,
    dataset="photos",
    command="deepclust cluster images=photos",
    trust={"message": "how far to trust the clusters: well repeatable, 3 seeds agree to 0.95"},
)


def make_page(folder: Path, *, side: int = 120) -> Page:
    """Write the report of 40 random images in three clusters, with names, copies, outliers and a tree."""
    source, assignments = ArraySource([make_noise(40, side, side, 3)]), np.arange(40) % 3
    paths = [f"sub/{number}.jpg" for number in range(40)]
    options = {"source": source, "paths": paths, "links": lambda index: f"../photos/sub/{index}.jpg"}
    findings = Findings(
        names={0: "cat", 1: "<b>dog</b>"},
        merges=[Merge([0], [2], 0.25), Merge([1], [0, 2], 0.5)],
        copies=[[3, 6]],
        duplicates=[[3, 6, 9], [1, 2]],
        outlier_scores=np.linspace(1, 1.5, 40),
        outliers=np.array([39, 38]),
    )
    confidence = np.linspace(0, 1, 40)
    return write_page(
        folder,
        choose_cluster_pictures(assignments, confidence, per_cluster=3, seed=0, **options),
        results=RESULTS,
        findings=findings,
        finding_pictures=choose_finding_pictures(findings, assignments, **options),
        drawers=render_drawers(assignments, confidence, clusters=[0, 1, 2], **options),
    )


def test_a_drawer_has_every_image_with_name_and_link_the_most_confident_first() -> None:
    drawers = render_drawers(
        np.array([0, 1] * 10),
        np.linspace(0, 1, 20),
        source=make_numbered_images(20),
        paths=[f"{number}.png" for number in range(20)],
        links=lambda index: f"../{index}.png",
        clusters=[1],
    )
    page = Page(drawers[1])
    (sheet,) = (json.loads(text) for text in page.values("details", "data-sheet"))
    assert sheet["names"] == [f"{number}.png" for number in range(19, 0, -2)] and sheet["links"][0] == "../19.png"
    assert "All 10 images" in page.text
    pixels = decode_image(page.values("img", "src")[0])
    columns = sheet["columns"]
    shown = [pixels[sheet["dy"] * (i // columns), sheet["dx"] * (i % columns)] for i in range(10)]
    assert shown == list(range(19, 0, -2))


def test_drawers_stay_within_their_bytes_and_their_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawers_module, "MAX_BYTES", 200_000)
    monkeypatch.setattr(drawers_module, "MAX_IMAGES", 100)
    source, assignments = ArraySource([make_noise(300, 96, 96, 3)]), np.arange(300) % 4
    drawers = render_drawers(assignments, np.ones(300), source=source, paths=None, links=None, clusters=[0, 1, 2, 3])
    assert 50_000 < sum(map(len, drawers.values())) < 250_000
    (sheet,) = (json.loads(text) for text in Page(drawers[2]).values("details", "data-sheet"))
    assert len(sheet["names"]) == 25 and sheet["names"][1] == "image 14" and "Every 3th" not in drawers[2]
    assert "Every 3rd of 75 images" in drawers[2]
    assert render_drawers(assignments, np.ones(300), source=None, paths=None, links=None, clusters=[0]) == {}


@pytest.mark.parametrize(("max_bytes", "kind"), [(2_000_000, "png"), (400_000, "jpeg")])
def test_small_images_are_jpegs_where_pngs_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, max_bytes: int, kind: str
) -> None:
    monkeypatch.setattr(drawers_module, "MAX_BYTES", max_bytes)
    source, assignments = ArraySource([make_noise(300, 32, 32, 3)]), np.arange(300) % 4
    drawers = render_drawers(assignments, np.ones(300), source=source, paths=None, links=None, clusters=[0, 1, 2, 3])
    uris = [uri for drawer in drawers.values() for uri in Page(drawer).values("img", "src")]
    assert len(uris) == 4
    assert all(uri.startswith(f"data:image/{kind};") for uri in uris) and sum(map(len, uris)) < 1.1 * max_bytes


def test_the_page_has_a_title_of_the_folder_names_and_findings(tmp_path: Path) -> None:
    page = make_page(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "photos: 40 images in 3 clusters" in page.text and "propos on" not in page.text
    assert text.index("how far to trust") < text.index("<nav>")
    assert "<b>dog</b>" in page.text and "cat (0) and cluster 2" in page.text
    assert "5 images in 2 groups" in page.text and "1 of them with the same file more than once" in page.text
    assert "2 images are farther" in page.text
    titles = page.values("img", "title")
    assert "sub/39.jpg, cluster 0, outlier score 1.50" in titles and "sub/6.jpg, cluster 0, the same file" in titles
    assert "../photos/sub/39.jpg" in page.values("img", "data-link")
    assert all(link.startswith("#") or not link for link in page.values("a", "href"))


def test_what_was_not_looked_for_is_left_out_and_nothing_found_is_said(tmp_path: Path) -> None:
    page = write_page(tmp_path, results=RESULTS, findings=Findings())
    assert not {"#Duplicates", "#Outliers", "#Alike"} & set(page.values("a", "href"))
    findings = Findings(duplicates=[], outlier_scores=np.ones(40), outliers=np.empty(0, np.int64))
    page = write_page(tmp_path, results=RESULTS, findings=findings)
    assert {"#Duplicates", "#Outliers"} <= set(page.values("a", "href"))


def test_columns_of_assignments_tell_outliers_and_groups() -> None:
    findings = Findings(
        duplicates=[[0, 2]], outlier_scores=np.array([1, 1.5, 1]), outliers=np.array([1]), copies=[[0, 2]]
    )
    assert findings.list_columns(3) == {
        "outlier": [0, 1, 0],
        "outlier_score": ["1.000", "1.500", "1.000"],
        "duplicate_group": [0, "", 0],
    }
    assert Findings().list_columns(3) == {}


def test_a_tree_of_very_many_clusters_names_the_next_merges_only() -> None:
    merges = [Merge([0], [1], 0.1)]
    for cluster in range(2, 100):
        merges.append(Merge(merges[-1].first + merges[-1].second, [cluster], 0.1 * cluster))
    assert "svg" not in render_tree(merges, {}, []) and "cluster 0 and cluster 1" in render_tree(merges, {}, [])
    assert render_tree(merges[:20], {}, []).count("<path") == 21 and render_tree(merges[:1], {}, []) == ""


@pytest.mark.parametrize("width", [1280, 390])
def test_a_click_enlarges_a_picture_and_names_its_file(browser: Browser, tmp_path: Path, width: int) -> None:
    make_page(tmp_path)
    tab = Tab(browser, tmp_path / "report.html", width=width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    side = tab.evaluate("document.querySelector('.strip img').getBoundingClientRect().width")
    assert side >= 100 or width == 390
    tab.evaluate("document.querySelector('.strip img').click()")
    caption, link = "document.querySelector('.caption').textContent", "document.querySelector('.viewer a')"
    assert tab.evaluate(caption) == "sub/39.jpg, confidence 1.00"
    assert tab.evaluate(f"{link}.getAttribute('href')") == "../photos/sub/39.jpg"
    assert tab.evaluate("document.querySelector('.viewer canvas').width") > 2 * 120 or width == 390
    tab.press_key("ArrowRight")
    assert tab.evaluate(caption).startswith("sub/36.jpg")
    tab.press_key("Escape")
    assert not tab.evaluate("document.querySelector('.viewer').open")
    tab.close()


def test_a_drawer_opens_with_all_images_of_its_cluster(browser: Browser, tmp_path: Path) -> None:
    make_page(tmp_path)
    tab = Tab(browser, tmp_path / "report.html", width=1280)
    count = tab.evaluate("""new Promise(resolve => {
      const drawer = document.querySelector('.drawer');
      new MutationObserver(() => resolve(drawer.querySelectorAll('canvas').length)).observe(drawer, {childList: true});
      drawer.open = true;
    })""")
    assert count == 14
    tab.evaluate("document.querySelectorAll('.drawer canvas')[13].click()")
    assert tab.evaluate("document.querySelector('.caption').textContent") == "sub/0.jpg, cluster 0, confidence 0.00"
    tab.close()


def test_names_are_edited_and_written(browser: Browser, tmp_path: Path) -> None:
    make_page(tmp_path)
    tab = Tab(browser, tmp_path / "report.html", width=1280)
    tab.evaluate("""(title => {
      title.textContent = 'tigers';
      title.dispatchEvent(new Event('input'));
      window.saved = new Promise(resolve => {
        URL.createObjectURL = blob => { blob.text().then(resolve); return '#'; };
      });
      document.querySelector('.save').click();
    })(document.querySelector('.name[data-k="2"]'))""")
    assert json.loads(tab.evaluate("window.saved")) == {"0": "cat", "1": "<b>dog</b>", "2": "tigers"}
    assert "beside this report" in tab.evaluate("document.querySelector('output').textContent")
    tab.close()


def test_small_images_of_few_pixels_keep_their_sharp_edges(browser: Browser, tmp_path: Path) -> None:
    make_page(tmp_path, side=8)
    tab = Tab(browser, tmp_path / "report.html", width=1280)
    assert tab.evaluate("document.querySelector('.strip img').getBoundingClientRect().width") > 50
    tab.evaluate("document.querySelector('.strip img').click()")
    assert tab.evaluate("document.querySelector('.viewer canvas').width") % 8 == 0
    tab.close()
