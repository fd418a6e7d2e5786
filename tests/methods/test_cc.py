"""CC: its two losses against slow versions, defined values for degenerate batches, and which images train what."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.methods.cc import CC, cluster_contrast, cluster_losses, instance_loss, normalized_columns


def make_method(num_features=6, num_clusters=4):
    backbone = nn.Linear(num_features, num_features)
    backbone.num_features = num_features
    torch.manual_seed(0)
    return CC(
        backbone=backbone,
        num_clusters=num_clusters,
        embedding_size=5,
        instance_temperature=0.5,
        cluster_temperature=1.0,
        optimizer=torch.optim.Adam,
        schedule=lambda step, steps_per_epoch: 1.0,
    )


def make_batch(size, extra=False):
    views = tuple(torch.randn(2, size, 6))
    return TrainBatch(views, torch.arange(size), Draws(key=(0,), first_row=0, global_batch_size=size), extra)


def slow_contrast(vectors, half, temperature):
    """The paper's equation over 2n vectors, of which i and i + n are positives; the cosine of a zero vector is 0."""

    def cosine(x, y):
        lengths = float(x.norm() * y.norm())
        return float(x @ y) / lengths if lengths else 0.0

    total = 0.0
    for i, vector in enumerate(vectors):
        positive = cosine(vector, vectors[(i + half) % (2 * half)]) / temperature
        exponentials = [math.exp(cosine(vector, v) / temperature) for j, v in enumerate(vectors) if j != i]
        total += -positive + math.log(sum(exponentials))
    return total / len(vectors)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_contrasts_follow_the_equation_of_the_paper(size):
    u_a, u_b, logits_a, logits_b = torch.randn(4, size, 5, dtype=torch.float64)
    expected = slow_contrast([*u_a, *u_b], size, 0.5)
    assert float(instance_loss(u_a, u_b, temperature=0.5)) == pytest.approx(expected, abs=1e-10)
    c_a, c_b = logits_a.softmax(1), logits_b.softmax(1)
    expected = slow_contrast([*c_a.T, *c_b.T], 5, 1.0)
    contrast, balance = cluster_losses(logits_a, logits_b, temperature=1.0)
    assert float(contrast) == pytest.approx(expected, rel=1e-10)
    assert float(balance) >= -1e-12


def test_an_empty_cluster_has_cosine_zero_and_finite_gradients():
    logits = torch.randn(2, 6, 4, dtype=torch.float64)
    logits[..., 3] = -1e4  # the softmax is exactly 0
    c_a, c_b = logits.softmax(2)
    assert not c_a[:, 3].any()
    expected = slow_contrast([*c_a.T, *c_b.T], 4, 1.0)
    assert float(cluster_contrast(c_a, c_b, temperature=1.0)) == pytest.approx(expected, rel=1e-10)
    logits.requires_grad_()
    contrast, balance = cluster_losses(*logits, temperature=1.0)
    (contrast + balance).backward()
    assert torch.isfinite(contrast + balance) and torch.isfinite(logits.grad).all()
    assert not logits.grad[..., 3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_almost_empty_cluster_gets_the_gradient_of_torchs_cosine_similarity(dtype):
    logits = torch.randn(6, 4, dtype=dtype)
    logits[:, 3] -= 22  # its length is above 0 and below the floor of 1e-8
    c = logits.softmax(1)
    assert 0 < float(c[:, 3].norm()) < 1e-8
    actual, reference = c.clone().requires_grad_(), c.clone().requires_grad_()
    probe = torch.randn(4, 4, dtype=dtype)
    columns, expected = normalized_columns(actual), F.cosine_similarity(reference.T[:, None], reference.T[None], dim=2)
    torch.testing.assert_close(columns @ columns.T, expected)
    ((columns @ columns.T) * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(actual.grad, reference.grad, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("size", "clusters"), [(1, 1), (1, 4), (2, 40), (3, 1)])
def test_tiny_batches_and_many_clusters(size, clusters):
    method = make_method(num_clusters=clusters)
    terms = method.losses(make_batch(size))
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())
    if size == 1:
        assert float(terms["instance"]) == 0


def test_extra_images_train_the_representation_only():
    method = make_method()
    terms = method.losses(make_batch(8, extra=True))
    sum(terms.values()).backward()
    assert float(terms["instance"]) > 0 and float(terms["cluster"]) == float(terms["balance"]) == 0
    assert not any(p.grad.any() for p in method.cluster_head.parameters())
    assert all(p.grad.any() for p in method.backbone.parameters())


def test_views_go_through_the_backbone_one_at_a_time():
    method = make_method()
    batch_sizes = []
    method.backbone.register_forward_hook(lambda module, args, output: batch_sizes.append(len(output)))
    method.losses(make_batch(8))
    assert batch_sizes == [8, 8], "batch normalisation has to see one view at a time"


def test_cluster_logits_are_those_of_the_cluster_head():
    method = make_method()
    images = torch.randn(10, 6)
    logits = method.cluster_logits(method.encode(images))
    assert torch.equal(logits, method.cluster_head(method.backbone(images)))


@pytest.mark.parametrize(("size", "num_warnings"), [(256, 0), (128, 1)])
def test_a_batch_size_other_than_the_papers_gives_a_warning(caplog, size, num_warnings):
    method = make_method()
    method._trainer = SimpleNamespace(datamodule=SimpleNamespace(batch_size=size))
    method.on_fit_start()
    assert len(caplog.records) == num_warnings


def test_losses_have_full_precision_under_autocast():
    u_a, u_b, logits_a, logits_b = torch.randn(4, 16, 8)
    exact = instance_loss(u_a, u_b, temperature=0.1), *cluster_losses(logits_a, logits_b, temperature=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = instance_loss(u_a, u_b, temperature=0.1), *cluster_losses(logits_a, logits_b, temperature=0.5)
        assert all(torch.equal(a, b) for a, b in zip(exact, under_autocast, strict=True))
        assert cluster_losses(logits_a.bfloat16(), logits_b, temperature=0.5)[0].dtype == torch.float32
