"""TCC: its losses against slow versions, its Gumbel noise, what its queues and its target networks hold."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.errors import InputError
from deepclust.methods.tcc import (
    TCC,
    average_by_cluster,
    cluster_contrast,
    contrast_with_queue,
    divergence_from_uniform,
    divergence_of_mean_from_uniform,
    relaxed_sample,
    sum_by_cluster,
)


def make_method(**settings):
    backbone = nn.Linear(6, 6)
    backbone.num_features = 6
    torch.manual_seed(0)
    arguments = {
        "num_clusters": 4,
        "embedding_size": 5,
        "context": "add",
        "ema_decay": 0.9,
        "symmetric": True,
        "assignment_temperature": 1.0,
        "gumbel_temperature": 0.8,
        "instance_temperature": 0.15,
        "cluster_temperature": 1.0,
        "prior": "each",
        "prior_weight": 1.0,
        "cluster_vector": "unit",
        "cluster_weight": 1.0,
        "key_queue_size": 40,
        "cluster_queue_size": 20,
    }
    return TCC(
        backbone=backbone,
        optimizer=torch.optim.Adam,
        schedule=lambda step, steps_per_epoch: 1.0,
        **{**arguments, **settings},
    )


def make_batch(size=8, *, number=0):
    generator = torch.Generator().manual_seed(number)
    views = tuple(torch.randn(2, size, 6, generator=generator))
    draws = Draws(key=(0, 0, number), first_row=0, global_batch_size=size)
    return TrainBatch(views, number * size + torch.arange(size), draws)


def slow_contrast(anchor, positive, negatives, temperature):
    """InfoNCE of one anchor, from its equation."""
    numerator = math.exp(float(anchor @ positive) / temperature)
    return -math.log(numerator / (numerator + sum(math.exp(float(anchor @ q) / temperature) for q in negatives)))


def unit(vector):
    return vector / max(float(vector.norm()), 1e-8)


@pytest.mark.parametrize("length", [0, 1, 12])
def test_the_contrast_of_images_follows_its_equation(length):
    queries, keys = torch.randn(2, 5, 3, dtype=torch.float64)
    queue = torch.randn(length, 3, dtype=torch.float64)
    is_negative = torch.arange(length) % 2 == 0
    loss = contrast_with_queue(queries, keys, queue, is_negative, temperature=0.5)
    rows = [slow_contrast(q, k, queue[::2], 0.5) for q, k in zip(queries, keys, strict=True)]
    assert float(loss) == pytest.approx(sum(rows) / 5, abs=1e-12)


def test_the_contrast_of_clusters_follows_its_equation():
    v, keys = torch.randn(2, 7, 3, dtype=torch.float64)
    logits, key_logits = torch.randn(2, 7, 4, dtype=torch.float64)
    queue, queue_clusters = torch.randn(9, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1, 1, -1, -1])
    clusters, key_clusters = sum_by_cluster(v, logits), sum_by_cluster(keys, key_logits)
    for k in range(4):
        expected = unit(sum(p[k] * row for p, row in zip(logits.softmax(1), v, strict=True)))
        torch.testing.assert_close(clusters[k], expected)
    loss = cluster_contrast(clusters, key_clusters, queue, queue_clusters, temperature=0.7)
    rows = []
    for k in range(4):
        others = [q for q, of in zip(queue, queue_clusters.tolist(), strict=True) if of not in (k, -1)]
        rows.append(slow_contrast(clusters[k], key_clusters[k], others, 0.7))
    assert float(loss) == pytest.approx(sum(rows) / 4)


def test_a_cluster_without_mass_is_zero_and_gives_no_gradient():
    logits = torch.randn(6, 3)
    logits[:, 1] = -1e4
    v = torch.randn(6, 2, requires_grad=True)
    logits.requires_grad_()
    clusters = sum_by_cluster(v, logits)
    assert not clusters[1].any()
    cluster_contrast(clusters, clusters.detach(), torch.randn(4, 2), torch.arange(4) % 3, temperature=1.0).backward()
    assert v.grad.isfinite().all() and logits.grad.isfinite().all() and not logits.grad[:, 1].any()


def test_the_vector_of_a_cluster_is_the_weighted_mean_of_its_embeddings():
    v, logits = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    logits[:, 2] = -1e4
    p = logits.softmax(1)
    expected = [sum(p[i, k] * v[i] for i in range(7)) / max(float(p[:, k].sum()), 1e-8) for k in range(4)]
    torch.testing.assert_close(average_by_cluster(v, logits), torch.stack(expected))
    assert not expected[2].any(), "a cluster without any mass"


def test_the_prior_of_the_mean_is_0_where_clusters_are_equally_large():
    certain = 1e4 * torch.eye(5)
    both = torch.stack([certain, certain[:1].repeat(5, 1)]).requires_grad_()
    prior = divergence_of_mean_from_uniform(both)
    prior.backward()
    assert float(prior.detach()) == pytest.approx(math.log(5) / 2) and both.grad.isfinite().all()
    assert float(divergence_of_mean_from_uniform(certain.unsqueeze(0))) == pytest.approx(0, abs=1e-6)


def test_terms_are_those_of_the_chosen_forms():
    method = make_method(prior="mean", cluster_vector="mean", assignment_temperature=0.5)
    batch = make_batch()
    v = torch.stack([method.encode(view) for view in batch.views])
    logits = method.cluster_logits(v)
    torch.testing.assert_close(logits, v @ method.cluster_head.weight.T * 2)
    terms = method.losses(batch)
    torch.testing.assert_close(terms["prior"], divergence_of_mean_from_uniform(logits))
    keys = method.target(batch.views[1])
    expected = average_by_cluster(keys, method.target_cluster_head(keys) / 0.5)
    torch.testing.assert_close(method.cluster_queue.rows[:4], expected)


def test_the_prior_is_0_where_nothing_is_decided_and_log_k_where_all_is():
    assert float(divergence_from_uniform(torch.ones(3, 5))) == pytest.approx(0, abs=1e-6)
    certain = (1e4 * torch.eye(5)).requires_grad_()
    prior = divergence_from_uniform(certain)
    prior.backward()
    assert float(prior.detach()) == pytest.approx(math.log(5)) and certain.grad.isfinite().all()


def test_gumbel_noise_is_that_of_the_global_batch_and_samples_the_assignment():
    whole = Draws(key=(0, 1, 2), first_row=0, global_batch_size=20_000)
    noise = whole.gumbel_like(torch.zeros(20_000, 3), "noise")
    part = replace(whole, first_row=19_995).gumbel_like(torch.zeros(5, 3, dtype=torch.float64), "noise")
    assert torch.equal(part, noise[19_995:].double())
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02), "Euler's constant"
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    samples = relaxed_sample(logits, noise, temperature=0.8)
    torch.testing.assert_close(samples.sum(1), torch.ones(20_000))
    shares = torch.bincount(samples.argmax(1)) / 20_000
    torch.testing.assert_close(shares, logits.exp(), rtol=0, atol=0.02)


@pytest.mark.parametrize("context", ["add", "concat"])
def test_both_directions_are_averaged(context):
    method, batch = make_method(context=context).double(), make_batch()
    batch.views = tuple(view.double() for view in batch.views)
    method.losses(make_batch(number=1).replace_views(*batch.views))  # fills the queues
    state = {name: value.clone() for name, value in method.state_dict().items()}
    both = method.losses(batch)
    assert all(float(term) > 0 for term in both.values())
    method.symmetric = False
    method.load_state_dict(state)
    forward = method.losses(batch)
    method.load_state_dict(state)
    gumbel_like = batch.draws.gumbel_like
    batch.draws.gumbel_like = lambda values, purpose: gumbel_like(values, "noise of b")
    backward = method.losses(batch.replace_views(*batch.views[::-1]))
    for name, term in both.items():
        torch.testing.assert_close(term, (forward[name] + backward[name]) / 2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_queues_hold_the_keys_of_earlier_batches_and_not_of_this_one(symmetric):
    method = make_method(symmetric=symmetric, prior_weight=0.0)
    first = method.losses(make_batch())
    assert [float(term) for term in first.values()] == [0, 0, 0], "there are no negatives yet"
    num_directions = 2 if symmetric else 1
    filled = method.key_queue.indices >= 0
    assert method.key_queue.indices[filled].tolist() == list(range(8)) * num_directions
    assert (method.cluster_queue.indices >= 0).sum() == 4 * num_directions
    batch = make_batch()
    torch.testing.assert_close(method.key_queue.rows[:8], method.target(batch.views[1]))
    key_clusters = sum_by_cluster(method.key_queue.rows[:8], method.target_cluster_head(method.key_queue.rows[:8]))
    torch.testing.assert_close(method.cluster_queue.rows[:4], key_clusters)
    second = method.losses(make_batch(number=1))
    assert float(second["instance"]) > 0 and float(second["cluster"]) > 0


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_all_target_networks_follow_the_online_ones(decay):
    method = make_method(ema_decay=decay)
    before = [p.clone() for p in (*method.target.parameters(), *method.target_cluster_head.parameters())]
    online = [*method.backbone.parameters(), *method.projector.parameters(), *method.cluster_head.parameters()]
    with torch.no_grad():
        for p in online:
            p.add_(torch.randn_like(p))
    method.is_optimizer_step = False  # gradients are still accumulated
    method.losses(make_batch())
    targets = [*method.target.parameters(), *method.target_cluster_head.parameters()]
    assert all(map(torch.equal, targets, before))
    method.is_optimizer_step = True
    method.losses(make_batch())
    for target, p_before, p in zip(targets, before, online, strict=True):
        torch.testing.assert_close(target, decay * p_before + (1 - decay) * p.detach())
    assert not any(target.requires_grad for target in targets)


def test_a_start_from_another_run_reaches_the_target():
    method, earlier = make_method(), make_method()
    nn.init.normal_(earlier.backbone.weight)
    method.start_from(earlier)
    assert torch.equal(method.target.backbone.weight, earlier.backbone.weight)


def test_the_cluster_is_the_arg_max_without_noise_of_unit_embeddings():
    method, images = make_method(), make_batch().views[0]
    features = method.encode(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(method.cluster_logits(features), features @ method.cluster_head.weight.T)


def test_extra_images_are_refused():
    with pytest.raises(InputError, match="TCC assigns every image"):
        make_method().losses(replace(make_batch(), extra=True))


def test_losses_have_full_precision_under_autocast():
    v, logits, noise, keys = torch.randn(1, 8, 5), torch.randn(1, 8, 4), torch.randn(1, 8, 4), torch.randn(1, 8, 5)
    exact, under_autocast = make_method(), make_method()
    expected = exact.compute_terms_and_fill_queues(v, logits, noise, keys, torch.arange(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = under_autocast.compute_terms_and_fill_queues(v, logits, noise, keys, torch.arange(8))
        assert under_autocast.encode(make_batch().views[0]).dtype == torch.float32
    assert all(map(torch.equal, terms, expected))
