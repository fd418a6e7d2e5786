"""DECS: threshold and loss against slow versions, the second pass, the first centres, and the warning of a collapse."""

import logging
from functools import partial

import pytest
import torch
from lightning import Callback
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.student_assignments import student_logits
from deepclust.commands.train import run
from deepclust.errors import InputError
from deepclust.methods.decs import DECS, compute_determinacies, compute_stabilities, otsu_threshold
from deepclust.nn.schedules import Constant
from tests.conftest import compose_train

SIZE, K = 3, 4


def make_method(**numbers):
    """Return DECS on vectors of five numbers, with a network that normalises over batches."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(5, SIZE), nn.BatchNorm1d(SIZE, momentum=0.5))
    backbone.num_features = SIZE
    arguments = {
        "determinacy": "linear",
        "variance_weight": 0.4,
        "batch_variance_weight": 1.0,
        "reconstruction_weight": 0.0,
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        **numbers,
    }
    method = DECS(
        backbone=backbone,
        decoder=nn.Linear(SIZE, 5),
        num_clusters=K,
        alpha=0.5,
        threshold_bins=1000,
        shuffle=False,
        kmeans_restarts=2,
        kmeans_max_iterations=50,
        kmeans_tolerance=0.0,
        schedule=Constant(),
        **arguments,
    )
    method.e_step(torch.randn(40, SIZE), ("test",))
    return method


def make_batch(images, extra=False):
    return TrainBatch((images,), torch.arange(len(images)), Draws((0,), 0, len(images)), extra)


# The threshold


def find_threshold_slowly(values, num_bins):
    """Return Otsu's threshold: every split of the bins is tried, with the means of both classes."""
    bins = [min(int(float(value) * num_bins), num_bins - 1) for value in values]
    best, threshold = 0.0, 0
    for last in range(num_bins):
        low, high = [b for b in bins if b <= last], [b for b in bins if b > last]
        if low and high:
            share = len(low) / len(bins)
            between = share * (1 - share) * (sum(low) / len(low) - sum(high) / len(high)) ** 2
            if between > best * (1 + 1e-9):
                best, threshold = between, last
    return threshold / num_bins


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_threshold_is_that_of_a_slow_search(sharpness):
    q = (sharpness * torch.randn(12, 5, generator=torch.Generator().manual_seed(1))).softmax(1)
    assert float(otsu_threshold(q, num_bins=200)) == find_threshold_slowly(q.flatten(), 200)


def test_threshold_of_few_values_by_hand():
    q = torch.tensor([[0.1234, 0.8766], [0.8, 0.2]])
    assert float(otsu_threshold(q, num_bins=1000)) == 0.2, "the last bin of the small values"
    assert float(otsu_threshold(torch.eye(3), num_bins=1000)) == 0
    assert float(otsu_threshold(torch.full((4, 5), 0.2), num_bins=1000)) == 0


# The loss


@pytest.mark.parametrize("form", ["linear", "quadratic"])
def test_loss_by_hand(form):
    method = make_method(determinacy=form, variance_weight=0.3, batch_variance_weight=0.7)
    z = torch.randn(6, SIZE)
    t = 0.37
    q = student_logits(z, method.centres.detach(), alpha=0.5).softmax(1).double()
    stabilities = []
    for row in q.tolist():
        f = [(t - x) / t if x < t else (x - t) / (1 - t) for x in row]
        f = [x**2 if form == "quadratic" else x for x in f]
        mean = sum(f) / K
        stabilities.append(mean - 0.3 * sum((x - mean) ** 2 for x in f) / K)
    mean = sum(stabilities) / 6
    determinacies = compute_determinacies(q, torch.tensor(t, dtype=torch.float64), form=form)
    actual = compute_stabilities(determinacies, variance_weight=0.3)
    torch.testing.assert_close(actual, torch.tensor(stabilities, dtype=torch.float64))
    terms = method.weigh_terms(actual)
    assert float(terms["instability"]) == pytest.approx(1 - mean)
    assert float(terms["stability_variance"]) == pytest.approx(-0.7 * sum((s - mean) ** 2 for s in stabilities) / 6)


def test_threshold_comes_from_running_statistics_and_the_loss_from_those_of_the_batch():
    method = make_method()
    images = 3 + 2 * torch.randn(32, 5)
    method.backbone.eval()
    q_inference = student_logits(method.backbone(images), method.centres, alpha=0.5).softmax(1)
    method.backbone.train()
    linear, norm = method.backbone
    embeddings = nn.functional.batch_norm(linear(images), None, None, norm.weight, norm.bias, training=True)
    q = student_logits(embeddings, method.centres, alpha=0.5).softmax(1)
    threshold = otsu_threshold(q_inference, num_bins=1000).float()
    assert threshold != otsu_threshold(q, num_bins=1000).float()
    stabilities = compute_stabilities(compute_determinacies(q, threshold, form="linear"), variance_weight=0.4)
    terms = method.losses(make_batch(images))
    torch.testing.assert_close(sum(terms.values()), 1 - stabilities.mean() - stabilities.var(correction=0))
    assert method.threshold == threshold and method.backbone.training
    assert torch.equal(method.cluster_sizes, torch.bincount(q_inference.argmax(1), minlength=K))
    assert norm.num_batches_tracked == 1, "the first pass leaves the running statistics alone"


def test_identical_images_have_finite_gradients():
    method = make_method()
    with torch.no_grad():
        method.centres.zero_()  # all assignments are alike, so Otsu's threshold is 0 where 1 / K is in the first bin
    method.threshold_bins = 2
    terms = method.losses(make_batch(torch.ones(8, 5)))
    sum(terms.values()).backward()
    assert float(method.threshold) == pytest.approx(0.001)
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_certain_assignments_have_no_loss_in_whatever_clusters_they_are():
    method = make_method(variance_weight=0.0)
    for assignments in (torch.arange(8) % K, torch.zeros(8, dtype=torch.int64)):
        q = nn.functional.one_hot(assignments, K).float()
        stabilities = compute_stabilities(
            compute_determinacies(q, torch.tensor(0.5), form="linear"), variance_weight=method.variance_weight
        )
        assert sum(method.weigh_terms(stabilities).values()) == 0


def test_decoder_is_trained_with_a_reconstruction_weight_only():
    images = torch.randn(6, 5)
    assert make_method().decoder is None
    method = make_method(reconstruction_weight=2.0)
    terms = method.losses(make_batch(images))
    expected = 2 * (method.decoder(method.backbone(images)) - images).square().mean()
    torch.testing.assert_close(terms["reconstruction"], expected)
    earlier = make_method(reconstruction_weight=1.0)
    nn.init.ones_(earlier.decoder.weight)
    method.start_from(earlier)
    assert torch.equal(method.decoder.weight, earlier.decoder.weight)
    with pytest.raises(InputError, match="no decoder to train on"):
        method.start_from(make_method())


def test_errors_say_what_is_missing():
    method = make_method()
    method.has_centres.fill_(False)
    assert method.cluster_logits(torch.randn(2, SIZE)) is None
    with pytest.raises(InputError, match="start and before are null"):
        method.on_train_start()
    with pytest.raises(InputError, match="extra images"):
        method.losses(make_batch(torch.randn(4, 5), extra=True))


# Whole runs on the digits


class WatchSteps(Callback):
    """Notes the images of each batch, and the centres before the first step of each epoch."""

    def __init__(self):
        WatchSteps.batches, WatchSteps.centres = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        if isinstance(pl_module, DECS):  # the stage before has none
            WatchSteps.centres.append(pl_module.centres.detach().clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if isinstance(pl_module, DECS):
            WatchSteps.batches.append(batch.indices.tolist())


def compose_run(*overrides):
    watch = "+callbacks.watch._target_=tests.methods.test_decs.WatchSteps"
    few = ["before.trainer.max_epochs=1", "report.map_points=0", "pixel_baseline_max_values=0"]
    return compose_train("method=decs", "hardware=cpu", *few, watch, "~callbacks.evaluation", *overrides)


def test_kmeans_sets_the_centres_once_and_images_keep_their_order(tmp_path):
    run(compose_run("trainer.max_steps=9"), tmp_path)
    assert [i for batch in WatchSteps.batches[:7] for i in batch] == list(range(1797))
    assert WatchSteps.batches[7:9] == WatchSteps.batches[:2]
    first, second = WatchSteps.centres  # Lightning calls a method's own hook after those of callbacks
    assert not first.any() and second.any()
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    distances = (state["centres"] - second).norm(dim=1)
    assert 0 < distances.max() < 0.1, "two steps of Adam, and no other k-means"
    assert int(state["cluster_sizes"].sum()) == 2 * 256, "of the second epoch so far"


def test_shares_are_logged_and_more_empty_clusters_than_before_warned_of(caplog):
    method, logged = make_method(), []
    method.log_dict = logged.append
    with caplog.at_level(logging.WARNING):
        for sizes in ([3, 2, 4, 1], [0, 5, 5, 0], [5, 0, 0, 5], [0, 0, 0, 10]):
            method.cluster_sizes.copy_(torch.tensor(sizes))
            method._trainer = type("Trainer", (), {"current_epoch": 6})()
            method.on_train_epoch_end()
    assert [record.getMessage()[:39] for record in caplog.records] == [
        "2 of 4 clusters had no image in epoch 7",
        "3 of 4 clusters had no image in epoch 7",
    ]
    assert logged[0] == {"train/smallest_cluster": pytest.approx(0.1), "train/largest_cluster": pytest.approx(0.4)}
