"""ProPos: its losses against slow versions written from the equations, its state between steps, and its schedules."""

import math

import pytest
import torch
import torch.nn.functional as F

from deepclust.batch import Draws, TrainBatch
from deepclust.config.build import build
from deepclust.losses.alignment import alignment_loss
from deepclust.losses.prototypes import batch_prototypes, prototype_scattering_loss
from deepclust.nn.ema import compute_ema_decay
from deepclust.nn.lars import ScaledStepLars
from deepclust.nn.schedules import WarmupCosine
from tests.conftest import compose_train


def slow_scattering(q, k, labels, num_clusters, temperature):
    """The scattering loss, computed cluster by cluster from its equations."""
    present = sorted(set(labels.tolist()) - {-1})

    def prototype(rows, cluster):
        members = [
            F.normalize(row, dim=0) for row, label in zip(rows, labels.tolist(), strict=True) if label == cluster
        ]
        return F.normalize(sum(members) / len(members), dim=0)

    online = {c: prototype(q, c) for c in present}
    target = {c: prototype(k, c) for c in present}
    total = 0.0
    for c in present:
        positive = online[c] @ target[c] / temperature
        negatives = sum(math.exp(online[c] @ online[d] / temperature) for d in present if d != c)
        absent = (num_clusters - len(present)) * math.exp(-10)
        total += -positive + math.log(math.exp(positive) + negatives + absent)
    return total / len(present)


@pytest.mark.parametrize("clusters", [2, 5, 40])
def test_scattering_follows_its_equation(clusters):
    generator = torch.Generator().manual_seed(clusters)
    q, k = torch.randn(2, 30, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, clusters, (30,), generator=generator)
    loss = prototype_scattering_loss(q, k, labels, clusters, temperature=0.5)
    assert float(loss) == pytest.approx(float(slow_scattering(q, k, labels, clusters, 0.5)), rel=1e-10)


def test_scattering_depends_neither_on_cluster_ids_nor_on_lengths():
    q, k = torch.randn(2, 20, 4, dtype=torch.float64)
    labels = torch.arange(20) % 5
    loss = prototype_scattering_loss(q, k, labels, 5, temperature=0.5)
    permuted = torch.tensor([3, 0, 4, 1, 2])[labels]
    torch.testing.assert_close(prototype_scattering_loss(q, k, permuted, 5, temperature=0.5), loss)
    torch.testing.assert_close(prototype_scattering_loss(7 * q, k / 3, labels, 5, temperature=0.5), loss)


@pytest.mark.parametrize("labels", [[0, 0, 0], [-1, -1, -1], [2, 2, 2]])
def test_scattering_of_one_or_no_cluster_is_finite(labels):
    q = torch.zeros(3, 4).requires_grad_()  # rows without a direction
    loss = prototype_scattering_loss(q, torch.randn(3, 4), torch.tensor(labels), 3, temperature=0.5)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(q.grad).all()
    if labels[0] < 0:
        assert float(loss) == 0


def test_gradients_reach_the_online_rows_only():
    q, k = torch.randn(12, 4, requires_grad=True), torch.randn(12, 4, requires_grad=True)
    (prototype_scattering_loss(q, k, torch.arange(12) % 3, 3, temperature=0.5) + alignment_loss(q, k)).backward()
    assert q.grad.abs().sum() > 0 and k.grad is None


def test_losses_have_full_precision_under_autocast():
    q, k = torch.randn(2, 16, 8)
    labels = torch.arange(16) % 4
    exact = prototype_scattering_loss(q, k, labels, 4, temperature=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prototype_scattering_loss(q, k, labels, 4, temperature=0.1), exact)
        assert prototype_scattering_loss(q.bfloat16(), k, labels, 4, temperature=0.1).dtype == torch.float32


def test_rows_without_a_cluster_belong_to_no_prototype():
    rows = torch.tensor([[1.0, 0], [0, 1.0], [5.0, 0]])
    prototypes = batch_prototypes(rows, torch.tensor([0, -1, 0]), 2)
    assert torch.equal(prototypes, torch.tensor([[1.0, 0], [0, 0]]))


def test_a_part_of_the_batch_gets_its_rows_of_the_noise_of_the_global_batch():
    whole = Draws(key=(0, 1, 2), first_row=0, global_batch_size=8).normal_like(torch.zeros(8, 3), "noise")
    part = Draws(key=(0, 1, 2), first_row=5, global_batch_size=8).normal_like(torch.zeros(3, 3), "noise")
    assert torch.equal(part, whole[5:])
    other = Draws(key=(0, 1, 3), first_row=0, global_batch_size=8).normal_like(torch.zeros(8, 3), "noise")
    assert not torch.equal(other, whole)
    batch = TrainBatch((whole,), torch.arange(8), Draws(key=(0,), first_row=0, global_batch_size=8))
    assert not batch.extra


def test_schedules_at_their_first_and_last_steps():
    schedule = WarmupCosine(warmup_epochs=50, epochs=1000, variant="fractional")
    assert schedule(117 * 50, 117) == 1.0
    assert schedule(117 * 1000, 117) == pytest.approx(
        0.00616, abs=1e-5
    )  # not 0: the cosine has run for 950 of 1000 epochs
    assert WarmupCosine(warmup_epochs=0, epochs=10, variant="stepwise")(1, 5) == 1.0
    assert compute_ema_decay(10, 10, start=0.9, end=1.0) == 1.0
    assert compute_ema_decay(0, 10, start=0.9, end=1.0) == pytest.approx(0.9)
    assert compute_ema_decay(3, 10, start=0.99, end=0.99) == 0.99


def test_optimiser_of_the_imagenet_experiment_excludes_what_the_authors_exclude():
    cfg = compose_train("experiment=propos_imagenet", "dataset.num_images=8", "method.hidden_size=8")
    method = build(cfg.method)
    groups = method.parameter_groups()
    excluded = {id(p) for group in groups if group.get("weight_decay") == 0 for p in group["params"]}
    names = [name for name, p in method.named_parameters() if p.requires_grad]
    parameters = dict(method.named_parameters())
    assert len(names) == 171 and len(excluded) == 107
    kept_norms = [n for n in names if parameters[n].dim() == 1 and id(parameters[n]) not in excluded]
    assert kept_norms == [
        "backbone.network.bn1.weight",
        *(f"backbone.network.layer{stage}.0.downsample.1.weight" for stage in (1, 2, 3, 4)),
        "projector.1.weight",
        "predictor.1.weight",
    ], "the five norms of ResNet-50 whose names tell nothing, and those of both heads"
    assert sum(len(group["params"]) for group in groups) == 171
    assert cfg.trainer.accumulate_grad_batches == 16 and method.make_optimizer.func is ScaledStepLars
