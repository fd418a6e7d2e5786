"""k-means and neighbours by faiss equal those by torch, and the settings say when which is taken."""

import logging

import pytest
import torch

from deepclust.clustering import backend, faiss_search
from deepclust.clustering.backend import ClusteringSettings, clustering_settings
from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.neighbor_graph import build_neighbor_graph_on_all_ranks
from deepclust.clustering.neighbors import mine_neighbors, nearest_neighbors
from deepclust.commands import evaluate
from deepclust.config.composition import read_defaults
from deepclust.engine import distributed
from deepclust.errors import InputError
from deepclust.methods.gcc import neighbor_lists
from deepclust.runs.checkpoint import load_checkpoint
from deepclust.runs.resume_checks import check_same_recipe, warn_of_other_seeding
from deepclust.runs.trusted_targets import read_run_config
from tests.clustering.kmeans_reference import KEY, METRICS, SETTINGS, make_blobs
from tests.conftest import compose_verb
from tests.processes import run_on_processes

DEFAULTS = {
    "backend": "torch",
    "seeding_rows_per_cluster": "auto",
    "neighbor_index": "flat",
    "neighbor_index_min_rows": 100_000,
}
pytest.importorskip("faiss")


def settings(**changes):
    return clustering_settings(**{**DEFAULTS, **changes})


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("num_clusters", [1, 5, 70])
def test_kmeans_by_faiss_equals_that_by_torch(metric, num_clusters):
    rows = make_blobs(600, 8, 5).float()
    arguments = {"num_clusters": num_clusters, "metric": metric, "restarts": range(3), "key": KEY, **SETTINGS}
    expected = kmeans(rows, **arguments)
    with settings(backend="faiss"):
        result = kmeans(rows, **arguments)
    assert torch.equal(result.assignments, expected.assignments)
    torch.testing.assert_close(result.centroids, expected.centroids)
    assert (result.restart, result.iterations) == (expected.restart, expected.iterations)
    assert result.inertia == pytest.approx(expected.inertia, rel=1e-5)


@pytest.mark.parametrize("metric", ["inner_product", "euclidean"])
@pytest.mark.parametrize("self_excluded", [False, True])
def test_neighbours_by_faiss_equal_those_by_torch(metric, self_excluded):
    rows = make_blobs(500, 8, 5).float() + 3
    exclude = torch.arange(500) if self_excluded else None
    expected = nearest_neighbors(rows, rows, 7, metric=metric, exclude=exclude)
    with settings(backend="faiss"):
        found = nearest_neighbors(rows, rows, 7, metric=metric, exclude=exclude)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_very_few_rows_have_approximate_neighbours_too(index):
    rows = make_blobs(5, 8, 2).float()
    with settings(backend="faiss", neighbor_index=index, neighbor_index_min_rows=1):
        assert torch.equal(mine_neighbors(rows, 2), mine_neighbors(rows, 2))


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_approximate_neighbours_have_their_recall_in_the_log(index, caplog):
    rows = make_blobs(3000, 8, 5).float()
    expected = mine_neighbors(rows, 5)
    with settings(backend="faiss", neighbor_index=index, neighbor_index_min_rows=3000), caplog.at_level(logging.INFO):
        found = mine_neighbors(rows, 5)
    assert torch.equal(found[:, 0], torch.arange(3000))
    assert (found[:, 1:] != found[:, :1]).all() and (found >= 0).all()
    share = (found[:, 1:, None] == expected[:, None, 1:]).any(2).double().mean()
    assert share > 0.8
    assert f"6 nearest of 3,000 by {index}: recall 0." in caplog.text or "recall 1.0000" in caplog.text


def test_few_rows_are_searched_exactly():
    rows = make_blobs(400, 8, 5).float()
    with settings(backend="faiss", neighbor_index="ivf", neighbor_index_min_rows=401):
        found = mine_neighbors(rows, 5)
    assert torch.equal(found, mine_neighbors(rows, 5))


def test_auto_times_both_and_says_which_it_took(caplog, monkeypatch):
    rows = make_blobs(300, 8, 5).float()
    monkeypatch.setattr(backend, "_winners", {})
    arguments = {"num_clusters": 5, "metric": "cosine", "restarts": [0], "key": KEY, **SETTINGS}
    with settings(backend="auto"), caplog.at_level(logging.INFO):
        kmeans(rows, **arguments)
        assert not caplog.messages  # too little work to repay it
        monkeypatch.setattr(backend, "MIN_PRODUCTS_FOR_TIMING", 1)
        result = kmeans(rows, **arguments)
        kmeans(rows, **arguments)
        nearest_neighbors(rows, rows, 3, metric="euclidean", exclude=None)
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("k-means among 5 x 8 by ") and "a block took faiss" in caplog.messages[0]
    assert caplog.messages[1].startswith("nearest neighbours among 300 x 8 by ")
    assert torch.equal(result.assignments, kmeans(rows, **arguments).assignments)


def test_with_several_processes_auto_is_torch(monkeypatch):
    monkeypatch.setattr(backend, "_winners", {})
    monkeypatch.setattr(backend, "MIN_PRODUCTS_FOR_TIMING", 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    rows = make_blobs(300, 8, 5).float()
    with settings(backend="auto"):
        nearest_neighbors(rows, rows, 3, metric="euclidean", exclude=None)
    assert not backend._winners


def search_graphs_that_differ(rank):
    """Return what this process would find by itself, and what the searches of methods return."""
    # Up to version 1.14, faiss builds the graph in no fixed order. Here it is another one on each process for certain.
    faiss_search.HNSW_LINKS, faiss_search.HNSW_BREADTH_SEARCHED = 4 + 2 * rank, 8
    rows = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    with settings(backend="faiss", neighbor_index="hnsw", neighbor_index_min_rows=1000):
        alone = nearest_neighbors(rows, rows, 5, metric="inner_product", exclude=None)[1]
        graph = build_neighbor_graph_on_all_ranks(rows, 5)
        return alone, [neighbor_lists(rows, 5), mine_neighbors(rows, 5), graph.starts, graph.neighbors, graph.weights]


@pytest.mark.slow
def test_processes_agree_on_approximate_neighbours(tmp_path):
    (alone, found), (alone_there, found_there) = run_on_processes(search_graphs_that_differ, 2, tmp_path)
    assert not torch.equal(alone, alone_there)
    for table, table_there in zip(found, found_there, strict=True):
        assert torch.equal(table, table_there)


def test_without_faiss_auto_is_torch_and_faiss_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "is_faiss_installed", lambda: False)
    monkeypatch.setattr(backend, "MIN_PRODUCTS_FOR_TIMING", 1)
    # The advice holds for `evaluate`, too, which has no key `clustering`.
    refusal = pytest.raises(InputError, match=r"faiss is not installed.*faiss-cpu, or train with clustering\.backend")
    with refusal, settings(backend="faiss"):
        pass
    with settings(backend="auto"):
        mine_neighbors(make_blobs(100, 8, 5), 5)


def test_torch_does_not_search_approximately():
    refusal = pytest.raises(InputError, match=r"neighbor_index is ivf.*set clustering.backend=faiss")
    with refusal, settings(neighbor_index="ivf"):
        pass


@pytest.mark.parametrize(
    ("rows_per_cluster", "num_rows", "num_clusters", "expected"),
    [
        ("auto", 70_000, 10, 70_000),
        ("auto", 100_000, 1000, 100_000),
        ("auto", 1_281_167, 1000, 64_000),
        (None, 1_281_167, 1000, 1_281_167),
        (10, 70_000, 10, 100),
        (10, 50, 10, 50),
    ],
)
def test_rows_that_seeding_looks_at(rows_per_cluster, num_rows, num_clusters, expected):
    chosen = ClusteringSettings(**DEFAULTS | {"seeding_rows_per_cluster": rows_per_cluster})
    assert chosen.num_seeding_rows(num_rows, num_clusters) == expected


@pytest.mark.parametrize("metric", METRICS)
def test_seeding_on_a_sample_is_repeated_and_nearly_as_good(metric):
    rows = make_blobs(2000, 8, 20)
    arguments = {"num_clusters": 20, "metric": metric, "key": KEY, **SETTINGS}
    full = kmeans(rows, restarts=range(3), **arguments)
    with settings(seeding_rows_per_cluster=20):
        sampled = kmeans(rows, restarts=range(3), **arguments)
        again = kmeans(rows, restarts=[sampled.restart], **arguments)
    assert torch.equal(sampled.assignments, again.assignments) and sampled.inertia == again.inertia
    assert sampled.inertia < 1.1 * full.inertia


@pytest.mark.parametrize("overrides", [["train"], ["cluster", "images=DIR", "num_clusters=2"]])
def test_commands_have_the_same_settings(overrides):
    cfg = compose_verb(*overrides)
    assert dict(cfg.clustering) == read_defaults("clustering") == DEFAULTS


def test_a_run_follows_the_settings_and_goes_on_with_the_same_ones_only(train_small, caplog):
    with caplog.at_level(logging.INFO):
        results, folder = train_small(
            "trainer.max_epochs=1", "clustering.backend=faiss", "clustering.seeding_rows_per_cluster=2"
        )
        assert "k-means++ chooses among" in caplog.text
        caplog.clear()
        again = evaluate.main(compose_verb("evaluate", f"run={folder}"))
        assert "k-means++ chooses among" in caplog.text and again["scores"] == results["scores"]
    by_faiss = read_run_config(load_checkpoint(folder))
    by_torch = by_faiss | {"clustering": DEFAULTS}
    with pytest.raises(InputError, match=r"made with clustering\.backend=torch, .*; set clustering\.backend=torch"):
        check_same_recipe(by_torch, by_faiss)
    from_before_there_were_settings = {key: value for key, value in by_faiss.items() if key != "clustering"}
    check_same_recipe(from_before_there_were_settings, by_torch)


@pytest.mark.parametrize(("num_images", "is_told"), [(10**6, True), (10**5, False)])
def test_a_run_from_before_there_were_settings_is_told_of_another_seeding(num_images, is_told, caplog):
    now = {"clustering": DEFAULTS, "dataset": {"num_images": num_images, "num_clusters": 1000}}
    warn_of_other_seeding({"dataset": now["dataset"]}, now)
    assert ("among 64,000 of 1,000,000 (clustering.seeding_rows_per_cluster)" in caplog.text) == is_told
    caplog.clear()
    warn_of_other_seeding(now, now)
    assert not caplog.text
    assert backend.EXACT.num_seeding_rows(num_images, 1000) == num_images
