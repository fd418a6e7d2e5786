"""GCC: its losses against slow versions, feature bank and graph against values by hand, both phases, and whole runs."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.commands.train import run
from deepclust.methods.gcc import (
    GCC,
    FeatureBank,
    assignment_losses,
    degree_weights,
    graph_contrast_loss,
    neighbor_lists,
    pretext_contrast_loss,
)
from tests.conftest import compose_train

M, P = 40, 3


def make_method(epoch=0, num_clusters=4):
    backbone = nn.Linear(6, 6)
    backbone.num_features = 6
    torch.manual_seed(0)
    method = GCC(
        backbone=backbone,
        num_images=M,
        num_clusters=num_clusters,
        embedding_size=5,
        bank_size=4,
        num_neighbors=5,
        num_positives=P,
        warmup_epochs=3,
        graph_every_n_epochs=2,
        temperature=0.1,
        representation_weight=2.0,
        balance_weight=2.0,
        optimizer=torch.optim.SGD,
        schedule=lambda step, steps_per_epoch: 1.0,
    )
    images = torch.randn(M, 6)
    datamodule = SimpleNamespace(fit=range(M), clean_batches=lambda fit, device: [images[:25], images[25:]])
    method._trainer = SimpleNamespace(current_epoch=epoch, datamodule=datamodule)
    return method


def make_batch(size, companions=None, extra=False):
    indices = torch.randperm(M)[:size] + M * extra
    companion_views = () if companions is None else tuple(torch.randn(P + 1, size, 6))
    draws = Draws(key=(0,), first_row=0, global_batch_size=size)
    return TrainBatch(tuple(torch.randn(2, size, 6)), indices, draws, extra, companion_views, companions)


def random_unit_vectors(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


# The losses


@pytest.mark.parametrize("size", [1, 2, 7])
def test_contrast_without_a_graph_is_its_equation(size):
    f_0, f_1 = random_unit_vectors(2, size, 5)
    expected = 0.0
    for i in range(size):
        denominator = sum(math.exp(float(f_0[i] @ g) / 0.1) for g in [*f_0, *f_1])
        expected -= math.log(math.exp(float(f_0[i] @ f_1[i]) / 0.1) / denominator) / size
    assert float(pretext_contrast_loss(f_0, f_1, temperature=0.1)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("size", "slots"), [(1, 3), (2, 1), (7, 3)])
def test_contrast_with_a_graph_is_its_equation(size, slots):
    f_0, f_1 = random_unit_vectors(2, size, 5)
    neighbors, weights = random_unit_vectors(slots, size, 5), torch.rand(slots, size, dtype=torch.float64) * 0.7 + 0.01
    expected = 0.0
    for i in range(size):
        positive, negative = 0.0, 0.0
        for j in range(size):
            negative += math.exp(float(f_0[i] @ f_0[j]) / 0.2)
            other = math.exp(float(f_0[i] @ f_1[j]) / 0.2)
            positive, negative = (positive + other, negative) if i == j else (positive, negative + other)
            for m in range(slots):
                weight = float(weights[m, j])
                e = math.exp(weight * float(f_0[i] @ neighbors[m, j]) / 0.2)
                positive, negative = (positive + weight * e, negative) if i == j else (positive, negative + e)
        expected -= math.log(positive / negative) / size
    got = graph_contrast_loss(f_0, f_1, neighbors, weights, temperature=0.2)
    assert float(got) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def slow_assignment(p, r):
    clusters = p.shape[1]

    def cosine(x, y):
        lengths = float(x.norm() * y.norm())
        return float(x @ y) / lengths if lengths else 0.0

    loss = 0.0
    for j in range(clusters):
        scores = [math.exp(cosine(p[:, j], r[:, k])) for k in range(clusters)]
        loss -= math.log(scores[j] / sum(scores)) / clusters
    shares = [float(s) for s in p.sum(0) / p.sum()]
    return loss, math.log(clusters) + sum(s * math.log(s) for s in shares if s)


@pytest.mark.parametrize(("size", "clusters"), [(1, 1), (1, 4), (9, 4), (3, 8)])
def test_contrast_of_clusters_is_its_equation(size, clusters):
    logits = torch.randn(2, size, clusters, dtype=torch.float64)
    got = [float(value) for value in assignment_losses(*logits)]
    assert got == pytest.approx(slow_assignment(*logits.softmax(2)), abs=1e-10)
    assert got[0] >= math.log(1 + (clusters - 1) / math.e) - 1e-12


def test_an_empty_cluster_has_cosine_zero_and_finite_gradients():
    logits = torch.randn(2, 6, 4, dtype=torch.float64)
    logits[..., 3] = -1e4  # the softmax is exactly 0
    logits[1, :, 2] = -1e4
    expected = slow_assignment(*logits.softmax(2))
    logits.requires_grad_()
    losses = assignment_losses(*logits)
    assert [value.item() for value in losses] == pytest.approx(expected, rel=1e-10)
    sum(losses).backward()
    assert torch.isfinite(logits.grad).all() and not logits.grad[..., 3].any()


def test_losses_are_full_precision_under_autocast():
    f_0, f_1 = random_unit_vectors(2, 16, 8).float()
    neighbors, weights, logits = random_unit_vectors(3, 16, 8).float(), torch.rand(3, 16), torch.randn(2, 16, 4)

    def compute_losses():
        return (
            pretext_contrast_loss(f_0, f_1, temperature=0.1),
            graph_contrast_loss(f_0, f_1, neighbors, weights, temperature=0.1),
            *assignment_losses(*logits),
        )

    exact = compute_losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(exact, compute_losses(), strict=True))
        assert assignment_losses(logits[0].bfloat16(), logits[1])[0].dtype == torch.float32


# The bank and the graph


def test_bank_keeps_the_last_features_of_each_image():
    bank = FeatureBank(num_images=3, size=2, num_features=1)
    for rows, indices in (([1.0, 5.0], [0, 1]), ([2.0], [0]), ([4.0], [0])):
        bank.push(torch.tensor(rows).unsqueeze(1), torch.tensor(indices))
    assert bank.mean().tolist() == [[3.0], [5.0], [0.0]]
    assert bank.counts.tolist() == [3, 1, 0]


def test_neighbor_lists_have_the_largest_products_also_for_short_features():
    features = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 1.0]])
    assert neighbor_lists(features, 2).tolist() == [[0, 1], [0, 1], [2, 0]]


def test_degree_weights_by_hand():
    # S: 0 lists 0, 1 and is listed by 1; 1 lists 1, 0 and is listed by 0, 2; 2 lists 1, 3 and itself nowhere; 3: 3, 2.
    neighbors = torch.tensor([[0, 1], [1, 0], [1, 3], [3, 2]])
    assert [len(s) for s in ({0, 1}, {0, 1, 2}, {1, 3}, {2, 3})] == [2, 3, 2, 2]
    expected = torch.tensor([3 / 2, 3 / 3, 3 / 2, 3 / 2], dtype=torch.float64).sqrt()
    torch.testing.assert_close(degree_weights(neighbors, 3), expected)


def test_degree_weights_are_those_of_a_slow_version_with_sets():
    neighbors = torch.stack([torch.randperm(M)[:6] for _ in range(M)])
    lists = [set(row) for row in neighbors.tolist()]
    degrees = [len(lists[i] | {j for j in range(M) if i in lists[j]}) for i in range(M)]
    expected = (3 / torch.tensor(degrees, dtype=torch.float64)).sqrt()
    torch.testing.assert_close(degree_weights(neighbors, 3), expected)
    assert float(expected.max()) <= math.sqrt(0.5)


def test_images_without_a_feature_get_that_of_their_clean_view():
    method = make_method(epoch=3)
    stored = torch.arange(0, M, 2)
    rows = random_unit_vectors(len(stored), 5).float()
    method.bank.push(rows, stored)
    method.on_train_start()
    features = method.embed(method.encode_all(method.trainer.datamodule.clean_batches(None, None), M)).detach()
    features[stored] = rows
    assert torch.equal(method.neighbors, neighbor_lists(features, 6))
    assert not method.bank.counts[1::2].any(), "features of clean views do not enter the bank"


def test_graph_is_rebuilt_every_few_epochs_after_the_warm_up():
    method = make_method()
    method.bank.push(random_unit_vectors(M, 5).float(), torch.arange(M))
    epochs = []
    method.rebuild_graph = lambda: epochs.append(method.current_epoch)
    for method.trainer.current_epoch in range(9):
        method.on_train_epoch_start()
    assert epochs == [3, 5, 7]


def test_companions_are_the_first_entries_of_the_list_and_a_random_one():
    method = make_method()
    draws = Draws(key=(0,), first_row=0, global_batch_size=M)
    assert method.companions(torch.arange(M), draws) is None, "no graph yet"
    method.trainer.current_epoch = 3
    method.on_train_start()
    indices = torch.arange(M).repeat(50)
    companions = method.companions(indices, draws)
    lists = method.neighbors[indices]
    assert torch.equal(companions[:, :P], lists[:, :P])
    positions = (lists == companions[:, P:]).float()
    assert positions.sum(1).eq(1).all() and positions.mean(0).sub(1 / 6).abs().max() < 0.05
    assert torch.equal(companions, method.companions(indices, draws)), "they depend on the draws only"


# One step


def test_without_a_graph_the_cluster_head_does_not_change():
    method = make_method()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = [p.clone() for p in method.cluster_head.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        terms = method.losses(make_batch(8))
        sum(terms.values()).backward()
        assert all(p.grad is not None for p in method.parameters()), "DDP expects a gradient of every parameter"
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
    assert float(terms["assignment"].detach()) == float(terms["balance"].detach()) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, method.cluster_head.parameters(), strict=True))
    assert not set(method.cluster_head.parameters()) & set(optimizer.state)


def test_a_step_with_a_graph_has_the_terms_of_its_equations():
    method = make_method(epoch=3)
    method.on_train_start()
    batch = make_batch(8)
    batch.companions = method.companions(batch.indices, batch.draws)
    batch.companion_views = tuple(torch.randn(P + 1, 8, 6))
    terms = method.losses(batch)
    sum(terms.values()).backward()
    assert all(p.grad.any() for p in method.parameters())
    terms = {name: term.detach() for name, term in terms.items()}
    with torch.no_grad():
        f_0, f_1, *neighbors = (
            F.normalize(method.contrastive_head(method.backbone(view)), dim=1)
            for view in (*batch.views, *batch.companion_views[:P])
        )
        weights = method.weights[batch.companions[:, :P]].T
        contrast = graph_contrast_loss(f_0, f_1, torch.stack(neighbors), weights, temperature=0.1)
        p, r = (
            method.cluster_head(method.backbone(view)).softmax(1) for view in (batch.views[0], batch.companion_views[P])
        )
    assignment, balance = slow_assignment(p, r)
    assert float(terms["representation"]) == pytest.approx(2 * float(contrast), rel=1e-5)
    assert float(terms["assignment"]) == pytest.approx(assignment, rel=1e-5)
    assert float(terms["balance"]) == pytest.approx(2 * balance, rel=1e-4)
    assert torch.equal(method.bank.rows[batch.indices, 0], f_1), "the bank stores the second view"


def test_views_pass_the_backbone_in_one_batch_and_each_neighbor_in_its_own():
    method = make_method(epoch=3)
    batch_sizes = []
    method.backbone.register_forward_hook(lambda module, args, output: batch_sizes.append(len(output)))
    method.losses(make_batch(8, torch.randint(M, (8, P + 1))))
    assert batch_sizes == [16, 8, 8, 8, 8], "batch statistics are those of these batches"


@pytest.mark.parametrize("epoch", [0, 3])
def test_extra_images_train_the_representation_and_are_not_remembered(epoch):
    method = make_method(epoch)
    terms = method.losses(make_batch(8, extra=True))
    sum(terms.values()).backward()
    assert float(terms["representation"].detach()) > 0
    assert not any(p.grad.any() for p in method.cluster_head.parameters())
    assert not method.bank.counts.any()


@pytest.mark.parametrize(("size", "clusters"), [(1, 1), (1, 4), (2, 40), (3, 1)])
def test_terms_of_tiny_batches_and_many_clusters_are_finite(size, clusters):
    method = make_method(epoch=3, num_clusters=clusters)
    method.on_train_start()
    terms = method.losses(make_batch(size, torch.randint(M, (size, P + 1))))
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())


# Whole runs


class StopInThirdEpoch(Callback):
    """Ends a run in the middle of its third epoch."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 8:
            raise InterruptedError


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_its_graph(tmp_path):
    settings = ["method=gcc", "hardware=cpu", "trainer.max_epochs=3", "method.warmup_epochs=1"]
    settings += ["callbacks.checkpoint.min_seconds=0", "callbacks.checkpoint.every_n_steps=1"]
    settings += ["batch_size=600", "backbone.widths=[4,4,8,8]", "evaluation.kmeans_restarts=1", "report.per_cluster=1"]
    settings += ["pixel_baseline_max_values=0"]
    states = []
    for name in ("whole", "interrupted"):
        (tmp_path / name).mkdir()
        if name == "interrupted":
            with pytest.raises(InterruptedError):
                run(
                    compose_train(*settings, "+callbacks.stop._target_=tests.methods.test_gcc.StopInThirdEpoch"),
                    tmp_path / name,
                )
        run(compose_train(*settings), tmp_path / name)
        states.append(torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert (states[0]["neighbors"] >= 0).all() and (states[0]["bank.counts"] == 3).all()
