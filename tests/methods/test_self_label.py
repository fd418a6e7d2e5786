"""Self-labelling: its loss against a slow version, the trained weights, their average, and whole runs."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.commands.train import run
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.methods.scan import SCAN
from deepclust.methods.self_label import SelfLabel, self_label_loss
from deepclust.nn.schedules import Constant
from deepclust.runs.checkpoint import load_checkpoint, load_method
from tests.conftest import compose_train

COMMON = {"optimizer": partial(torch.optim.SGD, lr=0.1), "schedule": Constant()}


class ToyMethod(ClusteringMethod):
    """A backbone, a cluster head that gives the clustering, and a projector that does not.

    It can lack a clustering of its own, or have one that depends on no weights with a gradient.
    """

    def __init__(self, *, num_clusters=3, has_clustering=True, is_frozen=False, seed=0):
        torch.manual_seed(seed)
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6))
        super().__init__(backbone=backbone, num_clusters=num_clusters, e_step_every_n_epochs=0, **COMMON)
        self.projector = nn.Linear(6, 2)
        self.head = nn.Linear(6, num_clusters)
        self.has_clustering, self.is_frozen = has_clustering, is_frozen

    def encode(self, images):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            return self.backbone(images)

    def cluster_logits(self, features):
        if self.is_frozen:
            return features[:, :3]
        return self.head(features) if self.has_clustering else None


def make_method(model=None, *, threshold=0.5, ema_mode="none", ema_decay=0.9, num_clusters=3, balanced=True):
    return SelfLabel(
        model=model or ToyMethod(),
        num_clusters=num_clusters,
        image_size=2,
        channels=1,
        threshold=threshold,
        balanced=balanced,
        ema_mode=ema_mode,
        ema_decay=ema_decay,
        **COMMON,
    )


def make_batch(size, *, seed=0, extra=False):
    views = torch.randn(2, size, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    return TrainBatch(tuple(views), torch.arange(size), Draws(key=(0,), first_row=0, global_batch_size=size), extra)


# The loss


def slow_self_label_loss(weak, strong, threshold, balanced):
    """Return the loss and the number of kept rows, row by row."""

    def softmax(row):
        return [math.exp(x) / sum(map(math.exp, row)) for x in row]

    kept = [(softmax(w), softmax(s)) for w, s in zip(weak.tolist(), strong.tolist(), strict=True)]
    kept = [(w.index(max(w)), s) for w, s in kept if max(w) > threshold]
    counts = [sum(y == k for y, _ in kept) for k in range(weak.shape[1])]
    weights = [len(kept) / counts[y] if balanced else 1.0 for y, _ in kept]
    total = sum(w * -math.log(s[y]) for w, (y, s) in zip(weights, kept, strict=True))
    return (total / sum(weights) if kept else 0.0), len(kept)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(("size", "threshold"), [(40, 0.8), (40, 0.0), (1, 0.1), (7, 0.999999)])
def test_loss_is_its_equation(size, threshold, balanced):
    weak, strong = 3 * torch.randn(2, size, 5, dtype=torch.float64)
    loss, share = self_label_loss(weak, strong, threshold=threshold, balanced=balanced)
    expected, kept = slow_self_label_loss(weak, strong, threshold, balanced)
    assert float(loss) == pytest.approx(expected, rel=1e-9) and float(share) == pytest.approx(kept / size)


def test_gradient_reaches_kept_rows_of_the_strong_view_only():
    weak, strong = (2 * torch.randn(2, 20, 4, dtype=torch.float64)).unbind(0)
    weak, strong = weak.requires_grad_(), strong.requires_grad_()
    self_label_loss(weak, strong, threshold=0.7, balanced=True)[0].backward()
    assert weak.grad is None
    assert torch.equal(strong.grad.abs().sum(1) > 0, weak.softmax(1).amax(1) > 0.7)


def test_loss_and_gradient_of_a_batch_without_a_confident_image_are_zero():
    weak = torch.zeros(6, 2)  # the probabilities equal the threshold and do not exceed it
    strong = torch.randn(6, 2, requires_grad=True)
    loss, share = self_label_loss(weak, strong, threshold=0.5, balanced=True)
    loss.backward()
    assert loss.detach() == share == 0 and not strong.grad.any()


def test_loss_is_full_precision_under_autocast():
    weak, strong = 4 * torch.randn(2, 16, 4)
    exact = self_label_loss(weak, strong, threshold=0.6, balanced=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = self_label_loss(weak, strong, threshold=0.6, balanced=True)
        assert self_label_loss(weak, strong.bfloat16(), threshold=0.6, balanced=True)[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(exact, got, strict=True))


# The trained weights


def trained_names(method):
    return {name for name, p in method.model.named_parameters() if p.requires_grad}


def test_only_weights_that_give_the_clustering_are_trained():
    model = ToyMethod()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = make_method(model)
    assert trained_names(method) == {n for n, _ in model.named_parameters() if not n.startswith("projector")}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "no value changes"
    assert {id(p) for p in method.parameter_groups()[0]["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def make_scan(*, train_backbone=True):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6))
    backbone.num_features = 6
    return SCAN(
        backbone=backbone,
        num_images=9,
        num_clusters=3,
        num_heads=3,
        num_neighbors=2,
        mine_on="projection",
        embedding_size=2,
        train_backbone=train_backbone,
        entropy_weight=5.0,
        select="last_epoch",
        e_step_every_n_epochs=1,
        **COMMON,
    )


def test_of_several_heads_only_the_selected_one_is_trained():
    earlier = make_scan()
    earlier.best_head.fill_(2)
    method, resumed = make_method(make_scan()), make_method(make_scan())
    method.start_from(earlier.eval())
    resumed.load_state_dict(method.state_dict())
    for each in (method, resumed):
        head_weights = {name for name in trained_names(each) if not name.startswith("backbone")}
        assert head_weights == {"heads.2.weight", "heads.2.bias"}
        images = torch.randn(5, 1, 2, 2)
        each.eval()
        assert torch.equal(each.cluster_logits(each.encode(images)), earlier.cluster_logits(earlier.encode(images)))


def test_a_backbone_that_the_earlier_run_did_not_train_is_trained_now():
    method = make_method(make_scan(train_backbone=False))
    assert any(name.startswith("backbone") for name in trained_names(method))
    assert method.model.backbone.training
    assert not method.eval().model.backbone.training and method.train().model.backbone.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ToyMethod(has_clustering=False)}, "no trained weights"),
        ({"model": ToyMethod(is_frozen=True)}, "no trained weights"),
        ({"num_clusters": 4}, r"dataset\.num_clusters=3"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        make_method(**options)


def test_a_missing_earlier_run_is_refused():
    with pytest.raises(InputError, match="start=DIR"):
        SelfLabel(model=None, num_clusters=3, image_size=2, channels=1, threshold=0.9, balanced=True, ema_mode="none",
                  ema_decay=0.9, **COMMON)  # fmt: skip


def test_extra_images_are_refused():
    with pytest.raises(InputError, match=r"dataset\.source\.extra=\[\]"):
        make_method().losses(make_batch(4, extra=True))


# A step


def test_a_step_has_the_loss_of_both_views_in_training_mode():
    method, batch = make_method(threshold=0.4), make_batch(16)
    twin = ToyMethod()
    weak, strong = (twin.cluster_logits(twin.encode(view)).detach() for view in batch.views)
    expected, kept = slow_self_label_loss(weak, strong, 0.4, True)
    terms = method.losses(batch)
    assert float(terms["self_label"]) == pytest.approx(expected, rel=1e-5) and 0 < kept < 16
    assert int(method.kept) == kept and float(method.kept_share) == pytest.approx(kept / 16)
    for own, other in zip(method.model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(own, other), "the weak view updates the running statistics too"
    terms["self_label"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_an_epoch_without_a_confident_image_ends_the_run():
    method = make_method(threshold=1.0)
    method.losses(make_batch(8))
    with pytest.raises(InputError, match=r"lower method\.threshold"):
        method.on_train_epoch_end()
    confident = make_method(threshold=0.0)
    confident.losses(make_batch(8))
    confident.on_train_epoch_end()
    resumed = make_method(threshold=1.0)
    resumed.load_state_dict(confident.state_dict())
    resumed.on_train_epoch_end()  # images that were kept before the run was interrupted count
    resumed._trainer = SimpleNamespace(current_epoch=1)
    resumed.on_train_epoch_start()
    assert int(resumed.kept) == 0


# The average of the weights


def take_step(method, seed):
    """Do an optimiser step by hand and update the average; return the weights between the two."""
    method.zero_grad()
    method.losses(make_batch(16, seed=seed))["self_label"].backward()
    with torch.no_grad():
        for p in method.parameters():
            if p.grad is not None:
                p -= 0.5 * p.grad
    weights = [p.detach().clone() for p in method.model.parameters()]
    method.update_average()
    return weights


@pytest.mark.parametrize("mode", ["shadow", "replace"])
def test_average_of_the_weights(mode):
    method = make_method(ToyMethod(), ema_mode=mode, threshold=0.3)
    expected = [p.detach().clone() for p in method.model.parameters()]
    initial_mean = method.model.backbone[2].running_mean.clone()
    for seed in range(3):
        stepped = take_step(method, seed)
        expected = [0.9 * e + 0.1 * s for e, s in zip(expected, stepped, strict=True)]
        for average, weight, e, s in zip(
            method.shadow.parameters(), method.model.parameters(), expected, stepped, strict=True
        ):
            torch.testing.assert_close(average, e)
            torch.testing.assert_close(weight, e if mode == "replace" else s)
    means = [network.backbone[2].running_mean for network in (method.model, method.shadow)]
    assert torch.equal(*means), "the averaged model has the running statistics of the trained one"
    assert torch.equal(means[0], initial_mean) == (mode == "replace")
    method.eval()
    images = torch.randn(5, 1, 2, 2)
    assert torch.equal(method.encode(images), method.shadow.encode(images))
    assert not any(p.requires_grad for p in method.shadow.parameters()) and not method.train().shadow.training


def test_without_an_average_the_trained_model_is_evaluated():
    method = make_method()
    take_step(method, 0)
    assert method.shadow is None and method.evaluated_model is method.model


def test_every_weight_is_saved_once():
    names = make_method().state_dict().keys()
    assert names == {*(f"backbone.{name}" for name in ToyMethod().state_dict()), "kept"}


def test_the_share_of_kept_images_is_logged_every_so_many_steps(monkeypatch):
    method, logged = make_method(), []
    monkeypatch.setattr(method, "log", lambda name, value: logged.append((name, float(value))))
    method.kept_share = torch.tensor(0.25)
    for step in range(1, 7):
        method._trainer = SimpleNamespace(global_step=step, log_every_n_steps=3)
        method.on_train_batch_end(None, None, 0)
    assert logged == [("train/kept", 0.25)] * 2


# Whole runs

RUN = ["dataset=digits", "hardware=cpu", "logger=none", "batch_size=450", "trainer.max_epochs=1"]
RUN += ["evaluation.kmeans_restarts=1", "pixel_baseline_max_values=0", "callbacks.checkpoint.min_seconds=0"]


def test_the_clustering_of_another_method_is_trained_further(tmp_path):
    run(compose_train("method=cc", *RUN), tmp_path / "cc")
    stage = ["method=self_label", "method.threshold=0.11", "method.ema_mode=shadow", f"start={tmp_path / 'cc'}"]
    results = run(compose_train(*stage, *RUN), tmp_path / "run")
    assert results["earlier"]["run"] == str(tmp_path / "cc")
    _, before = load_method(load_checkpoint(tmp_path / "cc"))
    _, method = load_method(load_checkpoint(tmp_path / "run"))
    for name, value in before.named_parameters():
        moved = not torch.equal(method.model.get_parameter(name), value)
        assert moved == (not name.startswith("instance_head")), name
