"""The page of the report: its scores and facts, escaped text, and nothing loaded from elsewhere."""

import base64
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust.report.cluster_pictures import choose_cluster_pictures
from deepclust.report.embedding_map import compute_embedding_map
from tests.report.pages import make_digits_map, make_numbered_images, make_results, write_metrics, write_page


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    source = make_numbered_images(6)
    clusters = choose_cluster_pictures(np.zeros(6, int), np.ones(6), source=source, per_cluster=2, seed=0)
    page = write_page(
        tmp_path,
        clusters,
        embedding=make_digits_map(60),
        contingency_table=np.eye(3, dtype=int),
        metrics_file=write_metrics(tmp_path),
    )
    text = (tmp_path / "report.html").read_text()
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert all(re.match("data:image/(png|jpeg);base64,", uri) for uri in page.values("img", "src"))
    assert all(link.startswith("#") for link in page.values("a", "href"))
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    policy = page.values("meta", "content")[1]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)  # the only one that the browser runs
    assert policy.endswith(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'")
    assert "script" not in write_page(tmp_path, clusters).tags


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    source, labels = make_numbered_images(3), np.zeros(3, int)
    clusters = choose_cluster_pictures(
        np.zeros(3, int),
        np.ones(3),
        source=source,
        labels=labels,
        class_names=[evil],
        paths=[f'"><img src=x>{evil}.png'] * 3,
        per_cluster=1,
        seed=0,
    )
    embedding = compute_embedding_map(
        torch.randn(3, 4),
        np.zeros(3, int),
        np.ones(3),
        source=source,
        labels=labels,
        paths=[f"</script>{evil}"] * 3,
        max_points=3,
        seed=0,
    )
    metrics_file = tmp_path / "metrics.csv"
    metrics_file.write_text("step,<script>\n1,0.5\n")
    changes = dict.fromkeys(("method", "dataset", "backbone", "command", "commit"), evil)
    health = {**make_results()["health"], evil: 1}
    page = write_page(
        tmp_path,
        clusters,
        embedding=embedding,
        results=make_results(**changes, versions={evil: evil}, health=health),
        contingency_table=np.ones((1, 1), int),
        class_names=[evil],
        metrics_file=metrics_file,
        config_text=evil,
    )
    assert page.tags.count("script") == 2  # the data of the points, and the script of the map
    assert page.text.count(evil) >= 10
    assert page.tags.count("img") == 3 + 1  # those of the cluster, and the pictures of the map
    assert page.values("img", "title") == [f'"><img src=x>{evil}.png, confidence 1.00, {evil}'] * 3


def test_a_file_name_that_is_not_valid_text_does_not_stop_the_report(tmp_path: Path) -> None:
    paths = ["caf\udce9.png"]  # how Python reads Latin-1 bytes in a UTF-8 file system
    source = make_numbered_images(1)
    clusters = choose_cluster_pictures(np.zeros(1, int), np.ones(1), source=source, paths=paths, per_cluster=1, seed=0)
    assert write_page(tmp_path, clusters).values("img", "title") == ["caf?.png, confidence 1.00"]


def test_header_shows_the_scores(tmp_path: Path) -> None:
    text = write_page(tmp_path).text
    for part in ("propos on digits", "90.0", "80.0", "70.0", "in percent, for the method's own rule"):
        assert part in text
    assert "k-means on its features · ACC 85.0 · NMI 75.0 · ARI 65.0" in text
    assert "cluster size entropy 0.987 · empty clusters 0" in text
    baseline = {"kmeans_on_pixels": {"acc": 0.3, "nmi": 0.2, "ari": 0.1}}
    text = write_page(tmp_path, results=make_results(baseline=baseline)).text
    assert "k-means on the pixels · ACC 30.0 · NMI 20.0 · ARI 10.0" in text


def test_header_shows_k_means_for_a_method_without_a_rule(tmp_path: Path) -> None:
    scores = {**make_results()["scores"], "method": None}
    text = write_page(tmp_path, results=make_results(scores=scores)).text
    assert "85.0" in text and "in percent, for k-means on its features" in text and "90.0" not in text


@pytest.mark.parametrize("scores", [None, {"method": None, "kmeans": None}])
def test_without_labels_the_header_shows_the_sizes_of_the_clusters(tmp_path: Path, scores: dict | None) -> None:
    results = make_results(scores=scores, num_classes=None)
    page = write_page(tmp_path, results=results, metrics_file=tmp_path / "missing.csv")
    assert "98.7" in page.text and "without labels" in page.text and "ACC" not in page.text
    assert "0\n empty" in page.text and "of the 3 clusters" in page.text
    assert page.values("a", "href") == ["#Run"]  # there are no pictures, table or curves


def test_run_section_shows_how_the_run_was_made(tmp_path: Path) -> None:
    text = write_page(tmp_path, config_text="alpha: 0.123\n").text
    for part in ("deepclust train seed=0", "1 h 2 min", "2.0 s", "5,123", "3.00 GiB", "2.11.0", "alpha: 0.123"):
        assert part in text
    assert "commit" not in text and "e step" not in text  # their values are None
