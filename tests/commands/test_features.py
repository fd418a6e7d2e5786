"""`deepclust features` on real runs, and methods on what it keeps."""

import json

import numpy as np
import pytest
import torch

from deepclust.commands.features import MADE_BY, main
from deepclust.commands.train import run
from deepclust.config.build import build
from deepclust.datasets.features import load_features
from deepclust.errors import InputError
from deepclust.runs.checkpoint import load_checkpoint, load_method
from deepclust.views.multiview import MultiView
from tests.conftest import compose_train, compose_verb
from tests.test_configurations import list_options


def make_features(*overrides):
    return main(compose_verb("features", "accelerator=cpu", *overrides))


@pytest.fixture
def pixel_features(tmp_path):
    return make_features("dataset=digits", "backbone=identity", f"output={tmp_path}/pixels")


def test_features_of_a_run_are_its_own(train_small, tmp_path):
    _, folder = train_small()
    images = load_features(path=str(make_features(f"run={folder}", f"output={tmp_path}/kept")), num_classes=10)
    _, method = load_method(load_checkpoint(folder))
    assert len(images.fit) == 1797 and len(images.labels) == 1797 and len(images.class_names) == 10
    assert images.pictures.shape == (8, 8, 1)
    pictures = images.pictures.read(np.arange(5)).float() / 255
    with torch.no_grad():
        expected = method.encode((pictures - 0.3053) / 0.3759)
    torch.testing.assert_close(images.fit.read(np.arange(5)).flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_are_made_once_and_anew_for_other_weights(tmp_path, capsys):
    network = ["dataset=digits", "backbone=conv_small", f"output={tmp_path}/kept"]
    folder = make_features(*network)
    written = (folder / "train_features.npy").stat().st_mtime_ns
    key = json.loads((folder / MADE_BY).read_text())["sha256"]
    assert make_features(*network) == folder and "there already" in capsys.readouterr().out
    assert (folder / "train_features.npy").stat().st_mtime_ns == written
    (folder / "test_labels.npy").write_bytes(b"of other images")
    make_features(*network, "seed=1")
    assert not (folder / "test_labels.npy").exists() and (folder / "train_labels.npy").is_file()
    assert json.loads((folder / MADE_BY).read_text())["sha256"] != key


def test_half_a_folder_is_made_anew(pixel_features, capsys):
    (pixel_features / MADE_BY).unlink()
    make_features("dataset=digits", "backbone=identity", f"output={pixel_features}")
    assert "there already" not in capsys.readouterr().out and (pixel_features / MADE_BY).is_file()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_k_means_on_kept_pixels_is_k_means_on_pixels(pixel_features, tmp_path, metric):
    overrides = ["dataset=features", f"dataset.path={pixel_features}", "method=kmeans", f"method.metric={metric}"]
    results = run(compose_train(*overrides, "hardware=cpu"), tmp_path)
    own = results["scores"]["method"]
    assert results["dataset"] == "pixels" and results["epochs"] == 0 and own["acc"] > 0.7
    if metric == "euclidean":
        assert own["nmi"] == pytest.approx(results["scores"]["kmeans"]["nmi"], abs=0.03)
    assert (tmp_path / "report.html").stat().st_size > 0


@pytest.mark.parametrize("method", ["cc", pytest.param("scan", marks=pytest.mark.slow)])
def test_head_methods_run_on_vectors(pixel_features, tmp_path, method):
    cfg = compose_train(f"method={method}", "dataset=features", f"dataset.path={pixel_features}", "hardware=cpu")
    stage = cfg
    while stage is not None:
        stage.trainer.max_epochs = 1
        stage = stage.get("before")
    assert run(cfg, tmp_path)["scores"]["method"] is not None


@pytest.mark.parametrize("dataset", list_options("dataset"))
def test_every_data_set_has_a_clean_view(dataset):
    path = ["dataset.path=DIR"] if dataset in ("arrays", "features", "folder") else []
    cfg = compose_verb("features", f"dataset={dataset}", "backbone=identity", *path)
    cfg.dataset.image_size = cfg.dataset.image_size or 8
    views = MultiView(pipelines=build(cfg.views), names=[], mean=None, std=None)
    size = cfg.dataset.image_size
    assert views.clean(torch.zeros(1, 1, size, size)).shape == (1, 1, size, size)


def test_of_an_array_file_and_a_network(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((20, 8, 8), np.uint8))
    folder = make_features(
        "dataset=arrays", f"dataset.path={tmp_path}/a.npy", "backbone=conv_small", f"output={tmp_path}/kept"
    )
    assert len(np.load(folder / "train_features.npy")) == 20


def test_says_what_is_missing():
    with pytest.raises(InputError, match="neither a run nor"):
        make_features()


def test_number_of_clusters_told_from_the_features(tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 5)) * 20
    np.save(tmp_path / "train_features.npy", (centres[np.arange(120) % 6] + rng.normal(size=(120, 5))).astype("f4"))
    (tmp_path / "train_paths.json").write_text(json.dumps([f"{i}.png" for i in range(120)]))
    asked = ["dataset=features", f"dataset.path={tmp_path}", "method=kmeans", "hardware=cpu", "batch_size=60"]
    results = run(compose_train(*asked, "dataset.num_clusters=auto", "report.map_points=0"), tmp_path)
    assert results["num_clusters"] == 6 and "all three agree" in results["number"]["message"]
    assert results["number"]["message"] in (tmp_path / "report.html").read_text()
    assert (tmp_path / "assignments.csv").read_text().splitlines()[1].endswith(",0.png")
    with pytest.raises(InputError, match="cannot be estimated from the pixels"):
        run(compose_train("dataset.num_clusters=auto", "hardware=cpu"), tmp_path / "new")
