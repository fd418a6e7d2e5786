"""SCC: what it finds on the digits, the number of clusters that it finds itself, and the clusters of new images."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from deepclust.backbones.identity import Identity
from deepclust.clustering.dendrogram_purity import dendrogram_purity
from deepclust.commands import evaluate
from deepclust.commands.train import run
from deepclust.config.build import build
from deepclust.errors import InputError
from deepclust.methods.scc import SCC
from deepclust.metrics import ContingencyTable, compute_scores
from deepclust.runs.checkpoint import load_checkpoint, load_method
from tests.conftest import compose_train, compose_verb

SMALL_RUN = ["method=scc", "hardware=cpu", "report.map_points=0", "evaluation.kmeans_restarts=1"]


def make_method(num_images, num_features, **options):
    defaults = {"num_clusters": "auto", "k": 25, "num_rounds": 100, "upper": "auto", "lower": "auto"}
    backbone = Identity(in_channels=num_features, image_size=1)
    defaults |= {"variant": "scc", "cut": "exact", "backbone": backbone, "num_images": num_images}
    return SCC(**(defaults | options))


def draw_blobs(num_blobs, size, seed=0):
    """Return rows (num_blobs * size, 8) around as many far directions, in random order, and their blobs."""
    random = np.random.default_rng(seed)
    blobs = random.permutation(np.repeat(np.arange(num_blobs), size))
    rows = np.eye(8)[blobs] + 0.05 * random.standard_normal((len(blobs), 8))
    return torch.from_numpy(rows.astype(np.float32)), blobs


@pytest.fixture
def blob_folder(tmp_path):
    rows, blobs = draw_blobs(4, 30)
    (tmp_path / "blobs").mkdir()
    np.save(tmp_path / "blobs/train_features.npy", rows.numpy())
    np.save(tmp_path / "blobs/train_labels.npy", blobs)
    return tmp_path / "blobs"


# The row of the specification's table on the digits: ACC, NMI and ARI in percent, purity and number of rounds.
@pytest.mark.parametrize(
    ("num_rounds", "expected"), [(50, (89.6, 88.8, 83.1, 0.875, 32)), (100, (89.6, 88.6, 82.8, 0.889, 64))]
)
def test_scores_on_the_pixels_of_the_digits(num_rounds, expected):
    rows, classes = load_digits(return_X_y=True)
    method = make_method(1797, 64, num_clusters=10, num_rounds=num_rounds, cut="nearest")
    method.e_step(torch.from_numpy(rows).float(), ())
    metric = ContingencyTable(num_clusters=method.num_clusters, num_classes=10)
    metric.update(method.assignments, torch.from_numpy(classes))
    scores, tree = compute_scores(metric.table[:-1]), method.cluster_tree()
    found = *(scores[name] * 100 for name in ("acc", "nmi", "ari")), dendrogram_purity(tree.partitions, classes)
    assert method.num_clusters == 10 and len(tree.partitions) == expected[4]
    assert found[:3] == pytest.approx(expected[:3], abs=0.051) and found[3] == pytest.approx(expected[3], abs=5e-4)


def test_auto_finds_the_number_of_clusters_and_everything_takes_it_from_the_state(blob_folder, tmp_path, capsys):
    overrides = [*SMALL_RUN, "dataset=features", f"dataset.path={blob_folder}", "dataset.num_clusters=auto"]
    overrides += ["dataset.num_classes=4", "method.k=10"]
    results = run(compose_train(*overrides), tmp_path)
    assert results["num_clusters"] == 4 and results["scores"]["method"]["acc"] == 1.0 and "number" not in results
    tree = results["tree"]
    assert tree["dendrogram_purity"] == 1.0 and 4 in tree["num_clusters"] and tree["num_clusters"][-1] == 4
    assert [merge["distance"] for merge in tree["merges"]] == [len(tree["num_clusters"])] * 3
    with np.load(tmp_path / "tree.npz", allow_pickle=False) as stored:
        assert stored["counts"].tolist() == tree["num_clusters"]
        assert stored["partitions"].shape == (len(stored["thresholds"]), 120)
    report = (tmp_path / "report.html").read_text()
    assert "Tree of the clusters" in report and "dendrogram purity 1.000" in report
    cfg, method = load_method(load_checkpoint(tmp_path))
    assert cfg.dataset.num_clusters == "auto" and method.num_clusters == 4
    evaluate.main(compose_verb("evaluate", f"run={tmp_path}"))
    assert json.loads(capsys.readouterr().out)["scores"] == results["scores"]


def test_images_of_the_fit_set_keep_their_clusters_and_new_ones_get_that_of_the_nearest():
    rows, _ = draw_blobs(5, 20)
    method = make_method(100, 8, num_clusters=5, k=8)
    method.e_step(rows, ())
    assert torch.equal(method.cluster_logits(rows).argmax(1), method.assignments)
    new_rows, _ = draw_blobs(5, 20, seed=1)
    nearest = torch.nn.functional.cosine_similarity(new_rows[:, None], rows[None], dim=2).argmax(1)
    logits = method.cluster_logits(3 * new_rows)
    assert torch.equal(logits.argmax(1), method.assignments[nearest]) and bool((logits <= 0).all())


def test_clusters_of_new_images_do_not_hang_on_the_precision_of_a_run():
    rows, _ = draw_blobs(5, 20)
    method = make_method(100, 8, num_clusters=5, k=8)
    method.e_step(rows, ())
    new_rows, _ = draw_blobs(5, 20, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = method.cluster_logits(new_rows)
    assert torch.equal(logits, method.cluster_logits(new_rows))


def test_the_state_of_a_method_comes_back_with_its_clusters():
    rows, _ = draw_blobs(3, 20)
    method, loaded = (make_method(60, 8, k=5) for _ in range(2))
    method.e_step(rows, ())
    loaded.load_state_dict(method.state_dict())
    assert loaded.num_clusters == method.num_clusters > 1
    assert torch.equal(loaded.cluster_logits(rows), method.cluster_logits(rows))


@pytest.mark.parametrize("variant", ["scc", "affinity", "reciprocal"])
@pytest.mark.parametrize("num_clusters", ["auto", 1, 3])
@pytest.mark.parametrize(
    "rows",
    [torch.ones(1, 2), torch.ones(9, 2), torch.zeros(4, 2), torch.tensor([[1.0, 0], [-1, 0], [0, 1]])],
    ids=["one", "equal", "zero", "opposite"],
)
def test_degenerate_rows_give_clusters(rows, num_clusters, variant):
    method = make_method(len(rows), 2, num_clusters=num_clusters, variant=variant)
    method.e_step(rows, ())
    assert method.num_clusters == (min(num_clusters, len(rows)) if num_clusters != "auto" else method.num_clusters)
    logits = method.cluster_logits(rows)
    assert logits.shape == (len(rows), method.num_clusters) and bool(logits.isfinite().all())
    method.cluster_tree().summarize()


def test_thresholds_that_rise_are_refused():
    method = make_method(60, 8, upper=1e-9)
    with pytest.raises(InputError, match=r"method\.upper"):
        method.e_step(draw_blobs(3, 20)[0], ())


def test_a_network_that_was_not_trained_is_named(caplog):
    class Network(nn.Linear):
        num_features = 8

    method = make_method(60, 8, backbone=Network(8, 8))
    method.e_step(draw_blobs(3, 20)[0], ())
    assert "start is null" in caplog.text


def test_an_image_set_may_ask_for_auto_too():
    cfg = compose_train(*SMALL_RUN, "dataset=digits", "backbone=identity", "dataset.num_clusters=auto")
    cfg.dataset.num_images = 1797
    assert build(cfg.method).wanted_clusters == "auto"
