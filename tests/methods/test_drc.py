"""DRC: its losses against slow versions, defined values for degenerate batches, and the weight of the cluster sizes."""

import math

import pytest
import torch
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.methods.drc import DRC, feature_contrast, probability_losses


def make_method(num_clusters=4, **settings):
    backbone = nn.Linear(6, 6)
    backbone.num_features = 6
    torch.manual_seed(0)
    arguments = {
        "feature_temperature": 0.5,
        "probability_temperature": 1.0,
        "normalize_features": True,
        "normalize_probabilities": True,
        "balance_weight": 0.05,
        "balance_batch_size": 256,
    }
    return DRC(
        backbone=backbone,
        num_clusters=num_clusters,
        optimizer=torch.optim.Adam,
        schedule=lambda step, steps_per_epoch: 1.0,
        **{**arguments, **settings},
    )


def make_batch(views, extra=False):
    size = len(views[0])
    return TrainBatch(tuple(views), torch.arange(size), Draws(key=(0,), first_row=0, global_batch_size=size), extra)


def slow_contrast(anchors, others, temperature, normalize):
    """The contrast row by row: the positive is the same row of `others`, the denominator sums over all of `others`."""

    def similarity(x, y):
        lengths = float(x.norm() * y.norm()) if normalize else 1.0
        return float(x @ y) / lengths / temperature if lengths else 0.0

    total = 0.0
    for i, anchor in enumerate(anchors):
        scores = [similarity(anchor, other) for other in others]
        total += -scores[i] + math.log(sum(math.exp(s) for s in scores))
    return total / len(anchors)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("size", "clusters"), [(1, 3), (9, 4), (3, 8)])
def test_losses_follow_their_equations(size, clusters, normalize):
    z_a, z_b = torch.randn(2, size, clusters, dtype=torch.float64)
    feature = feature_contrast(z_a, z_b, temperature=0.5, normalize=normalize)
    assert float(feature) == pytest.approx(slow_contrast(z_a, z_b, 0.5, normalize), abs=1e-10)
    p_a, p_b = z_a.softmax(1), z_b.softmax(1)
    probability, balance = probability_losses(z_a, z_b, temperature=0.7, normalize=normalize)
    assert float(probability) == pytest.approx(slow_contrast(p_a.T, p_b.T, 0.7, normalize), rel=1e-10)
    assert float(balance) == pytest.approx(sum(float(p_a[:, k].sum()) ** 2 for k in range(clusters)) / size)


def test_only_view_a_is_the_anchor():
    z_a, z_b = torch.randn(2, 8, 4)
    contrast_ab = feature_contrast(z_a, z_b, temperature=0.5, normalize=True)
    contrast_ba = feature_contrast(z_b, z_a, temperature=0.5, normalize=True)
    assert not torch.isclose(contrast_ab, contrast_ba)


@pytest.mark.parametrize("normalize", [True, False])
def test_losses_of_an_empty_cluster_are_finite_and_its_gradient_is_zero(normalize):
    z = torch.randn(2, 6, 4)
    z[..., 0] = -1e4
    z.requires_grad_()
    probability, balance = probability_losses(*z, temperature=1.0, normalize=normalize)
    (probability + balance).backward()
    assert torch.isfinite(probability + balance) and torch.isfinite(z.grad).all()
    assert not z.grad[..., 0].any()


def test_rows_of_zeros_and_a_single_row():
    zeros = torch.zeros(3, 4, requires_grad=True)
    loss = feature_contrast(zeros, zeros, temperature=0.5, normalize=True)
    loss.backward()
    assert float(loss) == pytest.approx(math.log(3)) and torch.isfinite(zeros.grad).all()
    assert float(feature_contrast(*torch.randn(2, 1, 4), temperature=0.5, normalize=True)) == 0


def test_the_balance_term_does_not_depend_on_the_batch_size():
    """A batch that holds every image twice has the same balance term as the batch that holds each once."""
    method = make_method()
    views = torch.randn(2, 16, 6)
    once = method.losses(make_batch(views))["balance"]
    twice = method.losses(make_batch([torch.cat([v, v]) for v in views]))["balance"]
    torch.testing.assert_close(once, twice)
    features = method.cluster_logits(method.encode(views[0])).softmax(1)
    expected = 0.05 * 256 * features.mean(0).square().sum()
    torch.testing.assert_close(once, expected)


def test_extra_images_count_in_the_contrast_of_images_only():
    method = make_method()
    terms = method.losses(make_batch(torch.randn(2, 8, 6), extra=True))
    assert float(terms["feature"]) > 0 and float(terms["probability"]) == float(terms["balance"]) == 0
    sum(terms.values()).backward()
    assert all(p.grad.any() for p in method.parameters())


def test_inner_products_depend_on_lengths_and_cosines_do_not():
    z_a, z_b = torch.randn(2, 8, 4, dtype=torch.float64)
    cosine = feature_contrast(z_a, z_b, temperature=0.5, normalize=True)
    torch.testing.assert_close(feature_contrast(3 * z_a, z_b, temperature=0.5, normalize=True), cosine)
    inner_product = feature_contrast(z_a, z_b, temperature=0.5, normalize=False)
    assert not torch.isclose(feature_contrast(3 * z_a, z_b, temperature=0.5, normalize=False), inner_product)


def test_losses_have_full_precision_under_autocast():
    z_a, z_b = torch.randn(2, 16, 8)
    exact = probability_losses(z_a, z_b, temperature=0.5, normalize=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = probability_losses(z_a, z_b, temperature=0.5, normalize=True)
        assert all(torch.equal(a, b) for a, b in zip(exact, under_autocast, strict=True))
        assert feature_contrast(z_a.bfloat16(), z_b, temperature=0.5, normalize=True).dtype == torch.float32
