"""TEMI: the loss against its equation, pairs, marginals, frozen layers, targets, and the head that predicts."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, linear, normalize

from deepclust.backbones.identity import Identity
from deepclust.batch import Draws, TrainBatch
from deepclust.errors import InputError
from deepclust.methods.temi import TEMI, ClusterHeads, feature_statistics, pair_weights, renew_marginals, temi_losses
from deepclust.nn.schedules import Constant

IMAGES, FEATURES, CLUSTERS = 30, 5, 4


def make_method(*, images=IMAGES, heads=3, neighbors=3, standardize=False, frozen_epochs=1, backbone=None):
    torch.manual_seed(0)
    return TEMI(
        backbone=backbone or Identity(in_channels=FEATURES, image_size=1),
        num_images=images,
        num_clusters=CLUSTERS,
        num_heads=heads,
        hidden_size=7,
        bottleneck_size=6,
        standardize=standardize,
        ema_decay=0.9,
        frozen_epochs=frozen_epochs,
        num_neighbors=neighbors,
        beta=0.6,
        temperature=0.1,
        target_temperature=0.1,
        marginal_momentum=0.9,
        optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        schedule=Constant(),
    )


def start(method, images, epoch=0):
    """Give the method a stand-in for a trainer whose data module has these vectors (M, D), and start its training."""
    datamodule = SimpleNamespace(fit=images, clean_batches=lambda source, device: iter(source.split(17)))
    method._trainer = SimpleNamespace(datamodule=datamodule, lightning_module=None, current_epoch=epoch)
    method.on_train_start()
    return method


def make_batch(size, *, extra=False):
    generator = torch.Generator().manual_seed(1)
    images, neighbors = torch.randn(2, size, FEATURES, generator=generator)
    draws = Draws(key=(0,), first_row=0, global_batch_size=size)
    return TrainBatch((images,), torch.arange(size), draws, extra, (neighbors,), torch.arange(size)[:, None])


def make_log_probabilities(heads, pairs, clusters, *, scale=3.0):
    return (scale * torch.randn(heads, 2 * pairs, clusters, dtype=torch.float64)).log_softmax(2)


# The loss


def slow_losses(log_q, log_t, marginals, beta):
    """Return the weighted loss of each pair in each head, number by number."""
    q, t = log_q.exp().tolist(), log_t.exp().tolist()
    num_heads, num_pairs, clusters = len(q), len(q[0]) // 2, range(len(q[0][0]))
    losses = torch.zeros(num_heads, num_pairs, dtype=torch.float64)
    for i in range(num_pairs):
        x, n = i, i + num_pairs
        weight = sum(t[h][x][k] * t[h][n][k] for h in range(num_heads) for k in clusters) / num_heads
        for h in range(num_heads):
            both = [
                -math.log(sum((q[h][v][k] * t[h][w][k]) ** beta / float(marginals[h, k]) for k in clusters))
                for v, w in ((x, n), (n, x))
            ]
            losses[h, i] = weight * sum(both) / 2
    return losses


@pytest.mark.parametrize(("heads", "pairs", "clusters"), [(1, 1, 2), (3, 5, 4), (2, 3, 9)])
def test_losses_are_their_equation(heads, pairs, clusters):
    log_q, log_t = (make_log_probabilities(heads, pairs, clusters) for _ in range(2))
    marginals = torch.rand(heads, clusters, dtype=torch.float64).softmax(1)
    for beta in (0.6, 1.0):
        got = temi_losses(log_q, log_t, marginals, beta=beta)
        torch.testing.assert_close(got, slow_losses(log_q, log_t, marginals, beta), rtol=1e-9, atol=1e-12)


def test_gradients_are_right_and_reach_the_trained_heads_only():
    log_q, log_t = make_log_probabilities(2, 2, 3), make_log_probabilities(2, 2, 3).requires_grad_()
    marginals = torch.full((2, 3), 1 / 3, dtype=torch.float64, requires_grad=True)

    def total(logits):
        return temi_losses(logits.log_softmax(2), log_t, marginals, beta=0.6).sum()

    assert torch.autograd.gradcheck(total, (log_q.requires_grad_(),))
    total(log_q).backward()
    assert log_t.grad is None and marginals.grad is None


def test_losses_follow_permuted_clusters_pairs_and_exchanged_images():
    log_q, log_t = (make_log_probabilities(2, 4, 5) for _ in range(2))
    marginals = torch.rand(2, 5, dtype=torch.float64).softmax(1)
    losses = temi_losses(log_q, log_t, marginals, beta=0.6)
    clusters, pairs = torch.randperm(5), torch.tensor([2, 0, 3, 1])
    of_clusters = temi_losses(log_q[..., clusters], log_t[..., clusters], marginals[:, clusters], beta=0.6)
    torch.testing.assert_close(of_clusters, losses)
    rows = torch.cat([pairs, pairs + 4])
    torch.testing.assert_close(temi_losses(log_q[:, rows], log_t[:, rows], marginals, beta=0.6), losses[:, pairs])
    exchanged = temi_losses(log_q.roll(4, 1), log_t.roll(4, 1), marginals, beta=0.6)
    torch.testing.assert_close(exchanged, losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_heads_and_empty_clusters_have_finite_losses_and_gradients(dtype):
    logits = torch.zeros(2, 6, 3, dtype=dtype)
    logits[..., 0] = 2000
    logits.requires_grad_()
    other = logits.detach().roll(1, 2)
    marginals = torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype).repeat(2, 1)
    for log_t in (logits.detach().log_softmax(2), other.log_softmax(2)):
        loss = temi_losses(logits.log_softmax(2), log_t, marginals, beta=0.6).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all()


def test_the_best_loss_is_minus_log_of_the_number_of_clusters():
    sure = (100.0 * torch.eye(4, dtype=torch.float64)).repeat(2, 1)[None].log_softmax(2)  # each pair has its cluster
    losses = temi_losses(sure, sure, torch.full((1, 4), 0.25, dtype=torch.float64), beta=0.6)
    torch.testing.assert_close(losses, torch.full((1, 4), -math.log(4), dtype=torch.float64))


def test_weights_are_high_where_all_heads_find_the_pair_in_one_cluster():
    certain = torch.tensor([[50.0, 0.0], [50.0, 0.0], [50.0, 0.0], [0.0, 50.0]]).log_softmax(1)  # pairs (0, 2), (1, 3)
    torch.testing.assert_close(pair_weights(certain[None]), torch.tensor([1.0, 0.0]))
    unsure = torch.full((4, 2), 0.5).log()
    torch.testing.assert_close(pair_weights(torch.stack([certain, unsure])), torch.tensor([0.75, 0.25]))


def test_marginals_are_the_moving_average_of_the_shares():
    log_t, before = make_log_probabilities(2, 3, 4), torch.full((2, 4), 0.25, dtype=torch.float64)
    after = renew_marginals(before, log_t, momentum=0.9)
    torch.testing.assert_close(after, 0.9 * before + 0.1 * log_t.exp().mean(1))
    torch.testing.assert_close(after.sum(1), torch.ones(2, dtype=torch.float64))


def test_losses_are_full_precision_under_autocast():
    log_q, log_t = (make_log_probabilities(2, 4, 3).float() for _ in range(2))
    marginals = torch.full((2, 3), 1 / 3)
    exact = temi_losses(log_q, log_t, marginals, beta=0.6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(temi_losses(log_q, log_t, marginals, beta=0.6), exact)


# The heads


def test_batched_heads_equal_heads_one_by_one():
    heads = ClusterHeads(num_heads=3, num_features=5, hidden_size=7, bottleneck_size=6, num_clusters=4)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn_like(p))
    features = torch.randn(9, 5)
    logits = heads(features)
    for h in range(3):
        hidden = gelu(linear(features, heads.hidden_weight[h], heads.hidden_bias[h]))
        bottleneck = normalize(linear(hidden, heads.bottleneck_weight[h], heads.bottleneck_bias[h]))
        expected = linear(bottleneck, heads.gain[h] * normalize(heads.direction[h]))
        torch.testing.assert_close(logits[h], expected)
        torch.testing.assert_close(heads(features, torch.tensor([h]))[0], expected)


def test_heads_start_as_the_authors_do_and_targets_start_equal():
    method = make_method(heads=40)
    assert float(method.heads.hidden_weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert bool((method.heads.gain == 1).all()) and not any(b.any() for b in method.heads.biases)
    assert float(method.heads.direction.detach().abs().max()) <= 6**-0.5
    for p, target in zip(method.heads.parameters(), method.target_heads.parameters(), strict=True):
        assert torch.equal(p, target) and not target.requires_grad
    torch.testing.assert_close(method.marginals, torch.full((40, CLUSTERS), 1 / CLUSTERS))


def test_weight_decay_acts_on_matrices_and_gains_and_not_on_biases():
    method = make_method()
    optimizer = method.make_optimizer(method.parameter_groups())
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decays[id(p)] for name, p in method.heads.named_parameters()}
    assert by_name == {name: 0.0 if "bias" in name else 0.1 for name in by_name} and len(decays) == 6


# A step


def do_step(method, optimizer, size=12):
    optimizer.zero_grad()
    sum(method.losses(make_batch(size)).values()).backward()
    method.on_before_optimizer_step(optimizer)
    optimizer.step()
    method.update_target()


def test_last_layers_stay_in_the_first_epoch_and_targets_follow_with_all_their_parts():
    method = start(make_method(), torch.randn(IMAGES, FEATURES))
    optimizer = method.make_optimizer(method.parameter_groups())
    for epoch, moves in ((0, False), (1, True)):
        method.trainer.current_epoch = epoch
        before = [p.detach().clone() for p in method.heads.last_layer]
        targets = [p.clone() for p in method.target_heads.parameters()]
        do_step(method, optimizer)
        assert [not torch.equal(a, b) for a, b in zip(before, method.heads.last_layer, strict=True)] == [moves] * 2
        for old, new, p in zip(targets, method.target_heads.parameters(), method.heads.parameters(), strict=True):
            torch.testing.assert_close(new, 0.9 * old + 0.1 * p)


def test_losses_of_heads_are_summed_in_an_epoch_and_the_best_target_head_predicts():
    method = start(make_method(frozen_epochs=0), torch.randn(IMAGES, FEATURES))
    optimizer = method.make_optimizer(method.parameter_groups())
    sums = []
    for _ in range(2):
        do_step(method, optimizer)
        sums.append(method.head_losses.clone())
    again = start(make_method(frozen_epochs=0), torch.randn(IMAGES, FEATURES))
    first_loss = float(again.losses(make_batch(12))["information"].detach())
    assert float(sums[0].mean() / 12) == pytest.approx(first_loss, rel=1e-5)
    assert not torch.equal(sums[0], sums[1])
    features = torch.randn(8, FEATURES)
    for best in range(3):
        method.head_losses.copy_(torch.tensor([0.5, 0.5, 0.5]).index_fill(0, torch.tensor([best]), -1.0))
        expected = method.target_heads(features)[best] / 0.1
        torch.testing.assert_close(method.cluster_logits(features), expected)
    method.on_train_epoch_start()
    assert not method.head_losses.any()


def test_backbone_is_neither_trained_nor_in_training_mode():
    backbone = nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6))
    backbone.num_features = 6
    method = start(make_method(backbone=backbone), torch.randn(IMAGES, FEATURES))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    do_step(method, method.make_optimizer(method.parameter_groups()))
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_extra_images_are_refused():
    with pytest.raises(InputError, match=r"dataset\.source\.extra=\[\]"):
        make_method().losses(make_batch(4, extra=True))


# Pairs


def test_partners_are_the_nearest_others_each_as_often():
    images = torch.randn(IMAGES, FEATURES)
    method = start(make_method(), images)
    rows = normalize(images)
    for image, neighbors in enumerate(method.neighbors.tolist()):
        order = sorted(range(IMAGES), key=lambda j, i=image: -float(rows[i] @ rows[j]))
        assert neighbors == [j for j in order if j != image][:3]
    indices = torch.zeros(3000, dtype=torch.int64)
    drawn = method.companions(indices, Draws(key=(0, 1), first_row=0, global_batch_size=3000))
    counts = [int((drawn == j).sum()) for j in method.neighbors[0]]
    assert drawn.shape == (3000, 1) and sum(counts) == 3000 and min(counts) > 900
    again = method.companions(indices, Draws(key=(0, 2), first_row=0, global_batch_size=3000))
    assert not torch.equal(drawn, again)


def test_neighbours_of_a_checkpoint_are_not_found_again():
    method, resumed = start(make_method(), torch.randn(IMAGES, FEATURES)), make_method()
    resumed.load_state_dict(method.state_dict())
    resumed.on_train_start()  # without a trainer, hence without a search
    assert torch.equal(resumed.neighbors_on_cpu, method.neighbors)


def test_fewer_images_than_neighbours_make_all_others_neighbours(caplog):
    method = start(make_method(images=3, neighbors=50), torch.randn(3, FEATURES))
    assert [sorted(row) for row in method.neighbors.tolist()] == [[1, 2], [0, 2], [0, 1]]
    assert "method.num_neighbors is 50 for 3 images" in caplog.text


def test_a_single_image_is_refused_and_two_are_neighbours(caplog):
    assert start(make_method(images=2, neighbors=1), torch.randn(2, FEATURES)).neighbors.tolist() == [[1], [0]]
    assert not caplog.text
    with pytest.raises(InputError, match="number of images is 1"):
        start(make_method(images=1), torch.randn(1, FEATURES))


def test_a_backbone_with_weights_and_without_an_earlier_run_is_named(caplog):
    backbone = nn.Linear(FEATURES, 6)
    backbone.num_features = 6
    start(make_method(backbone=backbone), torch.randn(IMAGES, FEATURES))
    assert "start and before are null" in caplog.text


# Standardised features


def test_standardised_features_have_mean_0_and_deviation_1_and_constant_numbers_stay_finite():
    images = 5 + 3 * torch.randn(IMAGES, FEATURES)
    images[:, 2] = 7
    method = start(make_method(standardize=True), images)
    scaled = method.scale_features(images)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(FEATURES), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std(0), torch.tensor([1.0, 1, 0, 1, 1]))
    assert torch.equal(feature_statistics(images)[1][2], torch.tensor(1.0))
    plain = start(make_method(), images)
    assert torch.equal(plain.scale_features(images), images)
    torch.testing.assert_close(method.encode(images), images)
