"""LNSCC: its losses against slow versions, its three phases, its pairs, and several processes."""

import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.neighbor_graph import build_neighbor_graph
from deepclust.commands.train import train
from deepclust.errors import InputError
from deepclust.methods.lnscc import (
    LNSCC,
    balance_loss,
    cluster_divergence,
    fit_similarity_curve,
    pair_losses,
    share_divergence,
    soft_assignments,
    target_distribution,
)
from deepclust.nn.schedules import Constant
from tests.conftest import compose_train
from tests.processes import run_on_processes

CURVE = {"a": 1.5, "b": 0.9}


def make_method(*, num_clusters=3, size=2, shares=None, neighbors=4):
    """Return an LNSCC for vectors of five numbers; its centres are set at epoch 2 and trained from epoch 4 on."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, size))
    backbone.num_features = size
    method = LNSCC(
        backbone=backbone,
        num_clusters=num_clusters,
        num_neighbors=neighbors,
        max_multiplicity=200,
        min_dist=0.1,
        spread=1.0,
        negatives=3,
        negative_weight=0.7,
        cluster_weight=0.1,
        balance_weight=0.2,
        cluster_shares=shares,
        centres_after_epochs=2,
        clustering_after_epochs=4,
        kmeans_runs=5,
        kmeans_max_iterations=50,
        kmeans_tolerance=0.0,
        optimizer=partial(torch.optim.Adam, lr=0.01),
        schedule=Constant(),
    )
    return set_epoch(method, 0)


def make_blobs(size=30):
    """Return three groups of vectors as images (size, 5, 1, 1) of one pixel."""
    centres = 4 * torch.eye(5)[torch.arange(size) % 3]
    return (centres + torch.randn(size, 5, generator=torch.Generator().manual_seed(0)))[:, :, None, None]


def set_epoch(method, epoch, images=None):
    images = make_blobs() if images is None else images
    data = SimpleNamespace(fit=images, seed=0, clean_batches=lambda source, device="cpu": source.split(8))
    precision_plugin = SimpleNamespace(forward_context=nullcontext)
    method._trainer = SimpleNamespace(current_epoch=epoch, datamodule=data, precision_plugin=precision_plugin)
    return method


def make_batch(size, *, first=0, total=None, extra=False):
    rows = make_blobs()
    at = slice(first, first + size)
    draws = Draws(key=(0,), first_row=first, global_batch_size=total or size)
    return TrainBatch((rows[at],), torch.arange(30)[at], draws, extra, (rows.flip(0)[at],))


def slow_pair_losses(z_i, z_j, permutation, weight, a, b):
    """Return the two sums of losses, pair by pair."""
    times = len(permutation) // len(z_i)

    def similarity(u, v):
        return 1 / (1 + a * math.dist(u, v) ** (2 * b))

    heads = [u for u in z_i.tolist() for _ in range(times)]
    tails = [v for v in z_j.tolist() for _ in range(times)]
    positive = sum(math.log(1 + 1 / similarity(u, v)) for u, v in zip(z_i.tolist(), z_j.tolist(), strict=True))
    negative = sum(math.log(1 + similarity(heads[n], tails[o])) for n, o in enumerate(permutation.tolist()))
    return positive, weight * negative


@pytest.mark.parametrize(("size", "times"), [(1, 1), (5, 1), (4, 6)])
def test_pair_losses_are_their_equations(size, times):
    z_i, z_j = torch.randn(2, size, 3, dtype=torch.float64)
    permutation = torch.randperm(size * times)
    losses = pair_losses(z_i, z_j, permutation, **CURVE, negative_weight=0.7)
    expected = slow_pair_losses(z_i, z_j, permutation, 0.7, **CURVE)
    assert [float(loss) for loss in losses] == pytest.approx(expected, rel=1e-12)


def test_gradients_of_pair_losses_are_right():
    z_i, z_j = torch.randn(2, 4, 3, dtype=torch.float64)
    permutation = torch.randperm(12)

    def losses(u, v):
        return pair_losses(u, v, permutation, **CURVE, negative_weight=0.7)

    assert torch.autograd.gradcheck(losses, (z_i.requires_grad_(), z_j.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_that_coincide_have_no_gradient(dtype):
    z_i = torch.randn(1, 3, dtype=dtype).repeat(4, 1).requires_grad_()
    z_j = z_i.detach().clone().requires_grad_()
    positive, negative = pair_losses(z_i, z_j, torch.arange(8), **CURVE, negative_weight=1.0)
    assert [positive.item(), negative.item()] == pytest.approx([4 * math.log(2), 8 * math.log(2)])
    (positive + negative).backward()
    assert not z_i.grad.any() and not z_j.grad.any()


def test_losses_of_distant_pairs_are_finite():
    z = torch.tensor([[0.0, 0.0], [1e12, 0.0]], requires_grad=True)
    losses = pair_losses(z, z.flip(0), torch.tensor([1, 0]), **CURVE, negative_weight=1.0)
    sum(losses).backward()
    assert all(torch.isfinite(loss) for loss in losses) and torch.isfinite(z.grad).all()


def test_similarity_curve_is_that_of_umap():
    assert fit_similarity_curve(min_dist=0.1, spread=1.0) == pytest.approx((1.57694, 0.89506), abs=1e-5)


def test_assignments_by_hand_and_their_invariances():
    z, centres = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    q = soft_assignments(z, centres)
    torch.testing.assert_close(q[0], torch.tensor([1, 0.2, 0.1]) / 1.3)
    torch.testing.assert_close(soft_assignments(z + 5, centres + 5), q)
    torch.testing.assert_close(soft_assignments(z, centres[[2, 0, 1]]), q[:, [2, 0, 1]])


def test_target_distribution_by_hand_and_with_an_empty_cluster():
    q = torch.tensor([[0.8, 0.2, 0.0], [0.4, 0.6, 0.0]], dtype=torch.float64)
    a, b = 0.64 / 1.2, 0.04 / 0.8
    c, d = 0.16 / 1.2, 0.36 / 0.8
    expected = torch.tensor([[a / (a + b), b / (a + b), 0], [c / (c + d), d / (c + d), 0]], dtype=torch.float64)
    torch.testing.assert_close(target_distribution(q), expected)
    q.requires_grad_()
    loss = cluster_divergence(q)
    loss.backward()
    slow = sum(float(p * (p / x).log()) for p, x in zip(expected.flatten(), q.flatten(), strict=True) if p > 0) / 2
    assert float(loss) == pytest.approx(slow, rel=1e-8) and torch.isfinite(q.grad).all()
    torch.testing.assert_close(q.grad[:, :2], -expected[:, :2] / q.detach()[:, :2] / 2)


@pytest.mark.parametrize("clusters", [1, 4])
def test_losses_of_even_assignments_are_zero(clusters):
    q = torch.full((6, clusters), 1 / clusters, dtype=torch.float64)
    shares = torch.full((clusters,), 1 / clusters, dtype=torch.float64)
    assert float(balance_loss(q, shares)) == pytest.approx(0, abs=1e-15)
    assert float(cluster_divergence(q)) == pytest.approx(0, abs=1e-8)


def test_losses_are_full_precision_under_autocast():
    z, centres = torch.randn(8, 3), torch.randn(2, 3)
    permutation = torch.randperm(8)

    def compute_losses():
        q = soft_assignments(z, centres)
        pairs = pair_losses(z, z.flip(0), permutation, **CURVE, negative_weight=1.0)
        return *pairs, cluster_divergence(q), balance_loss(q, torch.tensor([0.5, 0.5]))

    exact = compute_losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(loss, expected) for loss, expected in zip(compute_losses(), exact, strict=True))


def test_centres_are_those_of_the_run_with_shares_closest_to_the_requested_ones():
    assert share_divergence(torch.tensor([[9, 1], [5, 5]]), torch.tensor([0.5, 0.5])).tolist() == pytest.approx(
        [0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), 0], abs=1e-8
    )
    features = torch.randn(200, 2, generator=torch.Generator().manual_seed(3))
    divergences = {}
    for shares in ([1, 1, 1], [8, 1, 1]):
        method = make_method(shares=shares)
        before, address = method.centres.detach().clone(), method.centres.data_ptr()
        assert method.cluster_logits(features) is None, "without centres there is no clustering"
        method.e_step(features, ("test",))
        assert method.centres.data_ptr() == address and not torch.equal(method.centres, before)
        q = method.cluster_logits(features).softmax(1)
        torch.testing.assert_close(q, soft_assignments(features, method.centres))
        sizes = torch.bincount(q.argmax(1), minlength=3)
        divergences[shares[0]] = [
            float(share_divergence(sizes[None], torch.tensor(s) / sum(s))) for s in ([1, 1, 1], [8, 1, 1])
        ]
        method.e_step(features, ("test",))
        assert torch.equal(method.cluster_logits(features).softmax(1), q)
    assert divergences[1][0] <= divergences[8][0] and divergences[8][1] <= divergences[1][1]


@pytest.mark.parametrize("shares", [[1.0, 1.0], [1.0, 1.0, 0.0]])
def test_shares_that_do_not_fit_are_refused(shares):
    with pytest.raises(InputError, match="cluster_shares"):
        make_method(shares=shares)


def test_centres_are_trained_in_the_third_phase_only():
    method = make_method()
    optimizer = method.make_optimizer(method.parameter_groups())
    states, terms = [], {}
    for epoch in range(6):
        set_epoch(method, epoch).on_train_epoch_start()
        terms[epoch] = method.losses(make_batch(12))
        optimizer.zero_grad()
        sum(terms[epoch].values()).backward()
        assert method.centres.grad is not None, "DDP expects a gradient of every parameter"
        before = method.centres.detach().clone()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        is_same, has_state = torch.equal(before, method.centres), method.centres in optimizer.state
        states.append((is_same, has_state, bool(method.centres_set)))
    assert states == [(True, False, False)] * 2 + [(True, False, True)] * 2 + [(False, True, True)] * 2
    assert not any(terms[e][name].any() for e in range(4) for name in ("cluster", "balance"))
    assert float(terms[4]["cluster"]) > 0 and float(terms[4]["balance"]) > 0
    assert optimizer.state[method.centres]["step"] == 2 and optimizer.state[method.backbone[1].weight]["step"] == 6


def test_pairs_are_those_of_the_graph_and_are_not_saved():
    method = make_method()
    method.on_train_start()
    weights = build_neighbor_graph(make_blobs().flatten(1), 4).dense()
    counts = (200 * weights).floor()
    assert torch.equal(method.sampling_weights(), counts.sum(1))
    draws = Draws(key=(0, 1, 2), first_row=0, global_batch_size=30)
    companions = method.companions(torch.arange(30), draws)
    assert companions.shape == (30, 1) and counts[torch.arange(30), companions[:, 0]].gt(0).all()
    again = make_method()
    again.on_train_start()
    assert torch.equal(again.companions(torch.arange(30), draws), companions)
    assert set(method.state_dict()) == {"centres", "centres_set", *(n for n in method.state_dict() if "backbone" in n)}


@pytest.mark.parametrize("neighbors", [9, 15])
def test_fewer_images_than_neighbours_reduce_their_number(neighbors, caplog):
    method = set_epoch(make_method(neighbors=neighbors), 0, make_blobs(9))
    method.on_train_start()
    assert "using 8" in caplog.text and method.sampling_weights().gt(0).all()


def test_too_few_images_for_a_graph_are_refused():
    with pytest.raises(InputError, match="number of images is 2"):
        set_epoch(make_method(), 0, make_blobs(30)[:2]).on_train_start()
    set_epoch(make_method(), 0, make_blobs(30)[:3]).on_train_start()


def test_extra_images_are_refused():
    with pytest.raises(InputError, match="extra"):
        make_method().losses(make_batch(8, extra=True))


def _compute_terms_and_gradients(rank):
    method = set_epoch(make_method().double(), 4)
    batch = make_batch(6, first=6 * rank, total=12)
    double = [tuple(v.double() for v in views) for views in (batch.views, batch.companion_views)]
    terms = method.losses(TrainBatch(double[0], batch.indices, batch.draws, False, double[1]))
    sum(terms.values()).backward()
    for p in method.parameters():  # what DDP does
        torch.distributed.all_reduce(p.grad)
        p.grad /= 2
    return {name: float(term) for name, term in terms.items()}, [p.grad for p in method.parameters()]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    method = set_epoch(make_method().double(), 4)
    batch = make_batch(12)
    double = [tuple(v.double() for v in views) for views in (batch.views, batch.companion_views)]
    terms = method.losses(TrainBatch(double[0], batch.indices, batch.draws, False, double[1]))
    sum(terms.values()).backward()
    for process_terms, gradients in run_on_processes(_compute_terms_and_gradients, 2, tmp_path):
        assert process_terms == pytest.approx({name: float(term) for name, term in terms.items()}, rel=1e-12)
        for gradient, parameter in zip(gradients, method.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_never_interrupted(tmp_path):
    def run(folder, epochs):
        cfg = compose_train(
            "method=lnscc",
            "hardware=cpu",
            "pixel_baseline_max_values=0",
            f"trainer.max_epochs={epochs}",
            "method.centres_after_epochs=2",
            "method.clustering_after_epochs=3",
        )
        (tmp_path / folder).mkdir(exist_ok=True)
        train(cfg, tmp_path / folder)
        return torch.load(tmp_path / folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]

    whole = run("whole", 5)
    for epochs in (2, 3, 4, 5):  # stops before the centres are set, before they are trained, and after
        resumed = run("resumed", epochs)
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key
