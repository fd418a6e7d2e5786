"""GCC: its losses against slow versions, the bank and the graph by hand, the two phases, and whole runs."""

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
    graph_contrast,
    neighbor_lists,
    pretext_contrast,
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
    beside = () if companions is None else tuple(torch.randn(P + 1, size, 6))
    draws = Draws(key=(0,), first=0, total=size)
    return TrainBatch(tuple(torch.randn(2, size, 6)), indices, draws, extra, beside, companions)


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


# The losses


@pytest.mark.parametrize("size", [1, 2, 7])
def test_contrast_without_a_graph_is_its_equation(size):
    f_0, f_1 = unit(2, size, 5)
    expected = 0.0
    for i in range(size):
        everything = sum(math.exp(float(f_0[i] @ g) / 0.1) for g in [*f_0, *f_1])
        expected -= math.log(math.exp(float(f_0[i] @ f_1[i]) / 0.1) / everything) / size
    assert float(pretext_contrast(f_0, f_1, temperature=0.1)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("size", "slots"), [(1, 3), (2, 1), (7, 3)])
def test_contrast_with_a_graph_is_its_equation(size, slots):
    f_0, f_1 = unit(2, size, 5)
    neighbors, weights = unit(slots, size, 5), torch.rand(slots, size, dtype=torch.float64) * 0.7 + 0.01
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
    got = graph_contrast(f_0, f_1, neighbors, weights, temperature=0.2)
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
    f_0, f_1 = unit(2, 16, 8).float()
    neighbors, weights, logits = unit(3, 16, 8).float(), torch.rand(3, 16), torch.randn(2, 16, 4)

    def everything():
        return (
            pretext_contrast(f_0, f_1, temperature=0.1),
            graph_contrast(f_0, f_1, neighbors, weights, temperature=0.1),
            *assignment_losses(*logits),
        )

    exact = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(exact, everything(), strict=True))
        assert assignment_losses(logits[0].bfloat16(), logits[1])[0].dtype == torch.float32


# The bank and the graph


def test_bank_keeps_the_last_features_of_each_image():
    bank = FeatureBank(num_images=3, size=2, num_features=1)
    for rows, indices in (([1.0, 5.0], [0, 1]), ([2.0], [0]), ([4.0], [0])):
        bank.push(torch.tensor(rows).unsqueeze(1), torch.tensor(indices))
    assert bank.mean().tolist() == [[3.0], [5.0], [0.0]]
    assert bank.counts.tolist() == [3, 1, 0]


def test_lists_are_the_largest_products_also_of_short_rows():
    features = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 1.0]])
    assert neighbor_lists(features, 2).tolist() == [[0, 1], [0, 1], [2, 0]]


def test_weights_by_hand():
    # S: 0 lists 0, 1 and is listed by 1; 1 lists 1, 0 and is listed by 0, 2; 2 lists 1, 3 and itself nowhere; 3: 3, 2.
    neighbors = torch.tensor([[0, 1], [1, 0], [1, 3], [3, 2]])
    assert [len(s) for s in ({0, 1}, {0, 1, 2}, {1, 3}, {2, 3})] == [2, 3, 2, 2]
    expected = torch.tensor([3 / 2, 3 / 3, 3 / 2, 3 / 2], dtype=torch.float64).sqrt()
    torch.testing.assert_close(degree_weights(neighbors, 3), expected)


def test_weights_are_those_of_sets():
    neighbors = torch.stack([torch.randperm(M)[:6] for _ in range(M)])
    lists = [set(row) for row in neighbors.tolist()]
    sizes = [len(lists[i] | {j for j in range(M) if i in lists[j]}) for i in range(M)]
    expected = (3 / torch.tensor(sizes, dtype=torch.float64)).sqrt()
    torch.testing.assert_close(degree_weights(neighbors, 3), expected)
    assert float(expected.max()) <= math.sqrt(0.5)


def test_images_without_a_feature_get_that_of_their_clean_view():
    method = make_method(epoch=3)
    known = torch.arange(0, M, 2)
    rows = unit(len(known), 5).float()
    method.bank.push(rows, known)
    method.on_train_start()
    features = method.embed(method.encode_all(method.trainer.datamodule.clean_batches(None, None), M)).detach()
    features[known] = rows
    assert torch.equal(method.neighbors, neighbor_lists(features, 6))
    assert not method.bank.counts[1::2].any(), "a clean view is no training view"


def test_graph_is_renewed_every_few_epochs_after_the_warm_up():
    method = make_method()
    method.bank.push(unit(M, 5).float(), torch.arange(M))
    renewed = []
    method.renew_graph = lambda: renewed.append(method.current_epoch)
    for method.trainer.current_epoch in range(9):
        method.on_train_epoch_start()
    assert renewed == [3, 5, 7]


def test_companions_are_the_first_of_the_list_and_any_one_of_it():
    method = make_method()
    draws = Draws(key=(0,), first=0, total=M)
    assert method.companions(torch.arange(M), draws) is None, "no graph yet"
    method.trainer.current_epoch = 3
    method.on_train_start()
    indices = torch.arange(M).repeat(50)
    companions = method.companions(indices, draws)
    lists = method.neighbors[indices]
    assert torch.equal(companions[:, :P], lists[:, :P])
    places = (lists == companions[:, P:]).float()
    assert places.sum(1).eq(1).all() and places.mean(0).sub(1 / 6).abs().max() < 0.05
    assert torch.equal(companions, method.companions(indices, draws)), "by the draws alone"


# One step


def test_without_a_graph_the_cluster_head_stands_still():
    method = make_method()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = [p.clone() for p in method.cluster_head.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        terms = method.losses(make_batch(8))
        sum(terms.values()).backward()
        assert all(p.grad is not None for p in method.parameters()), "DDP waits for every parameter"
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
    assert float(terms["assignment"].detach()) == float(terms["balance"].detach()) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, method.cluster_head.parameters(), strict=True))
    assert not set(method.cluster_head.parameters()) & set(optimizer.state)


def test_a_step_with_a_graph_is_the_sum_of_its_equations():
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
        contrast = graph_contrast(f_0, f_1, torch.stack(neighbors), weights, temperature=0.1)
        p, r = (
            method.cluster_head(method.backbone(view)).softmax(1) for view in (batch.views[0], batch.companion_views[P])
        )
    assignment, balance = slow_assignment(p, r)
    assert float(terms["representation"]) == pytest.approx(2 * float(contrast), rel=1e-5)
    assert float(terms["assignment"]) == pytest.approx(assignment, rel=1e-5)
    assert float(terms["balance"]) == pytest.approx(2 * balance, rel=1e-4)
    assert torch.equal(method.bank.rows[batch.indices, 0], f_1), "the bank remembers the second view"


def test_views_meet_the_backbone_together_and_neighbors_on_their_own():
    method = make_method(epoch=3)
    seen = []
    method.backbone.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    method.losses(make_batch(8, torch.randint(M, (8, P + 1))))
    assert seen == [16, 8, 8, 8, 8], "batch statistics are of these"


@pytest.mark.parametrize("epoch", [0, 3])
def test_extra_images_teach_the_representation_and_are_not_remembered(epoch):
    method = make_method(epoch)
    terms = method.losses(make_batch(8, extra=True))
    sum(terms.values()).backward()
    assert float(terms["representation"].detach()) > 0
    assert not any(p.grad.any() for p in method.cluster_head.parameters())
    assert not method.bank.counts.any()


@pytest.mark.parametrize(("size", "clusters"), [(1, 1), (1, 4), (2, 40), (3, 1)])
def test_tiny_batches_and_many_clusters(size, clusters):
    method = make_method(epoch=3, num_clusters=clusters)
    method.on_train_start()
    terms = method.losses(make_batch(size, torch.randint(M, (size, P + 1))))
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())


# Whole runs


class Stop(Callback):
    """Ends a run in the middle of its third epoch."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 8:
            raise InterruptedError


@pytest.mark.slow
def test_a_run_that_is_cut_goes_on_with_its_graph(tmp_path):
    settings = ["method=gcc", "hardware=cpu", "trainer.max_epochs=3", "method.warmup_epochs=1"]
    settings += ["callbacks.checkpoint.min_seconds=0", "callbacks.checkpoint.every_n_steps=1"]
    settings += ["batch_size=600", "backbone.widths=[4,4,8,8]", "evaluation.kmeans_restarts=1", "report.per_cluster=1"]
    settings += ["pixel_baseline_max_values=0"]
    states = []
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        if name == "cut":
            with pytest.raises(InterruptedError):
                run(compose_train(*settings, "+callbacks.stop._target_=tests.methods.test_gcc.Stop"), tmp_path / name)
        run(compose_train(*settings), tmp_path / name)
        states.append(torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert (states[0]["neighbors"] >= 0).all() and (states[0]["bank.counts"] == 3).all()
