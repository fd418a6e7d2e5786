"""The clusterings of `deepclust cluster`: which library computes them, and on how many rows."""

from pathlib import Path

import numpy as np
import pytest

import deepclust
from deepclust.callbacks import evaluation
from deepclust.errors import InputError
from deepclust.runs.checkpoint import load_checkpoint
from deepclust.runs.trusted_targets import read_run_config
from tests.clustering.kmeans_reference import make_blobs

SHORT = {"rule": "kmeans", "num_seeds": 1, "hardware": "cpu", "report.map_points": 0, "outliers": False}
VECTORS = make_blobs(300, 8, 3).float().numpy()


def cluster(folder, **changes):
    overrides = SHORT | {name.replace("__", "."): value for name, value in changes.items()}
    return deepclust.cluster(VECTORS, 3, overrides=overrides, run_dir=folder, verbose=False)


def test_faiss_computes_the_clusters_where_it_is_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    from deepclust.clustering import faiss_search

    searched = []
    search = faiss_search.nearest_by_faiss
    monkeypatch.setattr(
        faiss_search,
        "nearest_by_faiss",
        lambda rows, *given, **options: searched.append(1) or search(rows, *given, **options),
    )
    by_torch = cluster(tmp_path / "run")
    assert not searched
    by_faiss = cluster(tmp_path / "run", clustering__backend="faiss")
    assert searched and np.array_equal(by_faiss.labels_, by_torch.labels_)
    assert by_faiss.results["run"] != by_torch.results["run"]  # each is kept
    for folder in (Path(by_faiss.results["run"]), by_faiss.run_dir):
        assert read_run_config(load_checkpoint(folder))["clustering"]["backend"] == "faiss"
    again = cluster(tmp_path / "run")
    assert again.results["run"] == by_torch.results["run"]


def test_an_approximate_search_by_torch_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"clustering\.neighbor_index is ivf.*set clustering\.backend=faiss"):
        cluster(tmp_path / "run", clustering__neighbor_index="ivf")


def test_kmeans_beside_the_clusters_is_fitted_to_the_rows_that_they_were_trained_on(tmp_path, monkeypatch):
    fitted = []
    fit = evaluation.kmeans_on_all_ranks
    monkeypatch.setattr(
        evaluation, "kmeans_on_all_ranks", lambda rows, **options: fitted.append(len(rows)) or fit(rows, **options)
    )
    result = cluster(tmp_path / "run", max_fitted=100)
    assert fitted and set(fitted) == {100} and len(result.labels_) == 300
    fitted.clear()
    cluster(tmp_path / "all", max_fitted=300)
    assert set(fitted) == {300}
