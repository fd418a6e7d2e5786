"""k-means as a method: what it writes, scores and exports is what k-means found, also far from the origin."""

import csv
import json

import numpy as np
import onnxruntime
import pytest
import torch

from deepclust.commands import evaluate, export
from deepclust.commands.train import run
from deepclust.datasets.features import load_features
from deepclust.runs.checkpoint import load_checkpoint, load_method
from deepclust.runs.resolve_config import resolve_config
from tests.conftest import compose_train, compose_verb

ORIGINS = {"at the origin": (0.0, 0.0), "map coordinates": (5e5, 54e5)}
SMALL_RUN = ["hardware=cpu", "batch_size=50", "report.map_points=0", "evaluation.kmeans_restarts=2"]


def write_blobs(folder, *, origin, spread) -> np.ndarray:
    """Write a table of four blobs of 50 rows each, 300 apart, around `origin`; return it."""
    random = np.random.default_rng(0)
    corners = np.array([[0, 0], [300, 0], [0, 300], [300, 300]])
    labels = np.repeat(np.arange(4), 50)
    rows = (corners[labels] + spread * random.standard_normal((200, 2)) + origin).astype(np.float32)
    np.save(folder / "train_features.npy", rows)
    np.save(folder / "train_labels.npy", labels)
    return rows


def read_assignments(folder) -> tuple[np.ndarray, np.ndarray]:
    rows = list(csv.DictReader((folder / "assignments.csv").open()))
    return np.array([int(row["cluster"]) for row in rows]), np.array([float(row["confidence"]) for row in rows])


@pytest.mark.parametrize("origin", ORIGINS.values(), ids=ORIGINS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_table_far_from_the_origin_gets_the_clusters_of_k_means(metric, origin, tmp_path, capsys):
    rows = write_blobs(tmp_path, origin=origin, spread=20)
    overrides = ["method=kmeans", f"method.metric={metric}", "dataset=features", f"dataset.path={tmp_path}"]
    results = run(compose_train(*overrides, "dataset.num_clusters=4", *SMALL_RUN), tmp_path)
    clusters, confidence = read_assignments(tmp_path)
    assert np.isfinite(confidence).all() and results["scores"]["kmeans"]["acc"] == 1.0
    if metric == "euclidean":
        assert results["scores"]["method"]["acc"] == 1.0

    evaluate.main(compose_verb("evaluate", f"run={tmp_path}"))
    assert json.loads(capsys.readouterr().out)["scores"] == results["scores"]
    images = rows[:, :, None, None]
    for form in ("torchscript", "onnx"):
        file = tmp_path / f"run.{form}"
        export.main(compose_verb("export", f"run={tmp_path}", f"format={form}", f"output={file}"))
        if form == "onnx":
            exported = onnxruntime.InferenceSession(file).run(None, {"images": images})[0]
        else:
            exported = torch.jit.load(file)(torch.from_numpy(images))[0].numpy()
        assert np.array_equal(exported, clusters), form


def test_lnscc_learns_a_table_far_from_the_origin_once_it_is_standardized(tmp_path, caplog):
    rows = write_blobs(tmp_path, origin=ORIGINS["map coordinates"], spread=20)
    overrides = ["method=lnscc", "dataset=features", f"dataset.path={tmp_path}", "dataset.num_clusters=4", *SMALL_RUN]
    short = ["method.centres_after_epochs=20", "method.clustering_after_epochs=22", "method.optimizer.lr=0.01"]
    overrides += [*short, "batch_size=200", "trainer.max_epochs=30"]
    cfg, _ = resolve_config(compose_train(*overrides), load_features(path=str(tmp_path), num_classes=None), None)
    assert cfg.multi_view.mean is None and "set dataset.standardize=true" in caplog.text
    caplog.clear()
    results = run(compose_train(*overrides, "dataset.standardize=true"), tmp_path)
    assert results["scores"]["method"]["acc"] == 1.0 and results["health"]["empty_clusters"] == 0
    assert "standardize" not in caplog.text
    cfg, _ = load_method(load_checkpoint(tmp_path))  # new vectors are scaled alike
    np.testing.assert_allclose(cfg.multi_view.mean, rows.astype(float).mean(0))
    np.testing.assert_allclose(cfg.multi_view.std, rows.astype(float).std(0))
