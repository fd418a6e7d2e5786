"""SeCu: its step against a slow version, and its state across steps, epochs and processes."""

import copy
import math
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.commands.train import train
from deepclust.errors import InputError
from deepclust.methods.secu import SeCu, stable_cross_entropies
from deepclust.nn.schedules import Constant
from tests.conformance.adapters.secu import run_on_ranks
from tests.conftest import compose_train

SIZE, IMAGES = 6, 12  # features of an embedding, images


def make_method(*, predictor=False, **options):
    """A SeCu of 3 and 6 clusters whose networks are linear, in float64."""
    method = build_method(predictor=predictor, **options)
    method.projector = nn.Linear(4, SIZE)
    if predictor:
        method.predictor = nn.Linear(SIZE, SIZE)
    return set_epoch(method.double(), 0)


def build_method(*, balance="size", multiples=(1, 2), predictor=False, seed=0, projector_layers=2):
    """A SeCu of 3 and 6 clusters with its own projector and predictor."""
    torch.manual_seed(seed)
    backbone = nn.Linear(5, 4)
    backbone.num_features = 4
    return SeCu(
        backbone=backbone,
        num_images=IMAGES,
        num_clusters=3,
        head_multiples=multiples,
        embedding_size=SIZE,
        hidden_size=7,
        projector_layers=projector_layers,
        predictor=predictor,
        temperature=0.1,
        prototype_temperature=0.2,
        label_weight=0.3,
        balance=balance,
        dual_step=0.5,
        min_share=0.9,
        entropy_weight=0.1,
        prototype_lr=0.7,
        prototype_schedule=Constant(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        schedule=Constant(),
        e_step_every_n_epochs=0,
    )


def set_epoch(method, epoch):
    method._trainer = SimpleNamespace(current_epoch=epoch)
    return method


def make_batch(indices, *, total=None, first=0, seed=1):
    """Two views of the images `indices`, which depend on the image and the seed only."""
    drawn = torch.randn(2, IMAGES, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    at = torch.tensor(indices)
    return TrainBatch(
        tuple(drawn[:, at]), at, Draws(key=(0,), first_row=first, global_batch_size=total or len(indices))
    )


def slow_losses(method, batch, first):
    """Return both losses and the assignments of the size rule, image by image from the equations; changes nothing."""
    outputs = [method.projector(method.backbone(view)) for view in batch.views]
    if method.predictor:
        outputs += [method.predictor(rows) for rows in outputs]
    outputs = [F.normalize(rows, dim=1).tolist() for rows in outputs]
    representation, prototypes, labels = 0.0, 0.0, []
    heads, rows = method.heads, len(batch.indices)

    def dots(row, columns):
        return [sum(a * b for a, b in zip(row, column, strict=True)) for column in columns]

    def log_softmax(logits):
        top = math.log(sum(math.exp(x) for x in logits))
        return [x - top for x in logits]

    for number, head in enumerate(heads):
        current = [(w / w.norm()).tolist() for w in head.prototypes.detach().T]
        frozen = head.frozen.T.tolist()
        labels.append([])
        for i in range(rows):
            similar = [dots(rows_of[i], current) for rows_of in outputs]
            scores = [sum(s[k] for s in similar) / len(similar) + float(d) for k, d in enumerate(head.balance.duals)]
            new = scores.index(max(scores))
            labels[-1].append(new)
            label = new if first else int(method.pseudo_labels[number, batch.indices[i]])
            for s in similar:
                prototypes -= log_softmax([x / 0.2 for x in s])[new]
            log_probabilities = [log_softmax([x / 0.1 for x in dots(rows_of[i], frozen)]) for rows_of in outputs]
            for view, own in enumerate(log_probabilities):
                other = log_probabilities[1 - view % 2]  # of the two projections
                for k, log_probability in enumerate(own):
                    representation -= (0.3 * (k == label) + 0.7 * math.exp(other[k])) * log_probability
    scale = len(heads) * rows * len(outputs)
    return representation / scale, prototypes / scale, labels


@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("indices", [[0, 3, 5, 11, 2], [7]])
def test_losses_are_their_equations(predictor, indices):
    method = make_method(predictor=predictor)
    for epoch in (0, 1):
        batch = make_batch(indices, seed=epoch)
        expected = slow_losses(set_epoch(method, epoch), batch, epoch == 0)
        terms = method.losses(batch)
        assert terms["representation"].item() == pytest.approx(expected[0], rel=1e-9)
        assert terms["prototypes"].item() == pytest.approx(expected[1], rel=1e-9)
        assert method.pseudo_labels[:, batch.indices].tolist() == expected[2]
        for head in method.heads:
            head.prototypes.data += 0.5 * torch.randn_like(head.prototypes)  # so that they differ from the frozen ones


def test_each_loss_moves_its_own_part():
    method, batch = make_method(), make_batch([0, 1, 2, 3])
    networks = [*method.backbone.parameters(), *method.projector.parameters()]
    prototypes = [head.prototypes for head in method.heads]
    terms = method.losses(batch)
    for term, moved, still in (("representation", networks, prototypes), ("prototypes", prototypes, networks)):
        gradients = torch.autograd.grad(terms[term], moved + still, allow_unused=True, retain_graph=True)
        assert all(g is not None and g.abs().sum() > 0 for g in gradients[: len(moved)])
        assert all(g is None for g in gradients[len(moved) :])


def test_prototype_gradient_is_stable():
    """It is -(1 - q) at the label and 0 elsewhere. Prototypes without members stay, and lengths do not change."""
    logits = torch.randn(2, 8, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 1, 3, 3, 0])
    losses = stable_cross_entropies(logits, labels)
    cross_entropies = F.cross_entropy(logits.flatten(0, 1), labels.repeat(2), reduction="none").view(2, 8)
    torch.testing.assert_close(losses, cross_entropies)
    losses.sum().backward()
    own = F.one_hot(labels, 5).double()
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(2) - 1) * own)

    method, batch = make_method(), make_batch([0, 1, 2, 3])
    method.losses(batch)["prototypes"].backward()
    for head, assigned in zip(method.heads, method.pseudo_labels[:, batch.indices], strict=True):
        empty = torch.bincount(assigned, minlength=head.prototypes.shape[1]) == 0
        assert not head.prototypes.grad[:, empty].any() and head.prototypes.grad[:, ~empty].abs().sum(0).min() > 0
        along = (head.prototypes.grad * head.prototypes).sum(0)
        assert along.abs().max() < 1e-12


def test_views_may_be_swapped():
    batch = make_batch([0, 4, 8])
    swapped = batch.replace_views(*reversed(batch.views))
    for term, value in make_method().losses(batch).items():
        torch.testing.assert_close(make_method().losses(swapped)[term], value)


def test_losses_are_full_precision_under_autocast():
    method, outputs = make_method().float(), torch.randn(2, 4, SIZE)
    exact = copy.deepcopy(method).compute_terms_and_update_pseudo_labels(outputs, torch.arange(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = method.compute_terms_and_update_pseudo_labels(outputs, torch.arange(4))
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("balance", ["size", "entropy"])
def test_an_image_not_seen_before_learns_its_new_label(balance):
    method = make_method(balance=balance)
    method.losses(make_batch([0, 1, 2, 3]))
    terms = set_epoch(method, 1).losses(make_batch([2, 3, 4, 5], seed=2))
    assert all(torch.isfinite(t) for t in terms.values())
    assert (method.pseudo_labels[:, :6] >= 0).all() and (method.pseudo_labels[:, 6:] == -1).all()
    if balance == "entropy":
        counted = [
            torch.bincount(row[row >= 0], minlength=k) for row, k in zip(method.pseudo_labels, (3, 6), strict=True)
        ]
        for head, expected in zip(method.heads, counted, strict=True):
            assert head.balance.counts.tolist() == expected.tolist()


@pytest.mark.parametrize("balance", ["size", "entropy"])
def test_processes_together_are_one(balance):
    """Also if processes hold unequal parts, or nothing, and if images change their process between epochs."""
    single, ranks = make_method(balance=balance), [make_method(balance=balance) for _ in range(3)]
    everything = list(range(10))
    for epoch, cuts in enumerate([(0, 3, 7, 10), (0, 6, 6, 10), (0, 1, 5, 10)]):
        order = everything if epoch % 2 == 0 else everything[::-1]

        def compute_gradients(rank, order=order, epoch=epoch, cuts=cuts):
            indices = order[cuts[rank] : cuts[rank + 1]]
            method = set_epoch(ranks[rank], epoch)
            if indices:
                batch = make_batch(indices, total=len(order), first=cuts[rank], seed=epoch)
            else:
                batch = make_empty_batch(epoch, len(order))
            method.zero_grad()
            sum(method.losses(batch).values()).backward()
            return [p.grad for p in method.parameters()]

        gradients = run_on_ranks(compute_gradients, 3)
        single.zero_grad()
        sum(set_epoch(single, epoch).losses(make_batch(order, seed=epoch)).values()).backward()
        for parameter, *rank_gradients in zip(single.parameters(), *gradients, strict=True):
            torch.testing.assert_close(sum(rank_gradients) / 3, parameter.grad, rtol=1e-9, atol=1e-12)
        for method in ranks:
            for name, value in single.named_buffers():
                torch.testing.assert_close(method.get_buffer(name), value, msg=lambda m, n=name: f"{n}: {m}")


def make_empty_batch(seed, total):
    batch = make_batch([0], seed=seed)
    draws = Draws(key=(0,), first_row=0, global_batch_size=total)
    return TrainBatch(tuple(view[:0] for view in batch.views), batch.indices[:0], draws)


def test_groups_hold_the_prototypes_apart():
    networks, prototypes = make_method(predictor=True).parameter_groups()
    assert prototypes["lr"] == 0.7 and [tuple(p.shape) for p in prototypes["params"]] == [(SIZE, 3), (SIZE, 6)]
    assert len(networks["params"]) == 6


def test_clusters_are_those_of_the_head_of_k():
    method = make_method(multiples=(2, 1))
    features = method.encode(torch.randn(4, 5, dtype=torch.float64))
    prototypes = method.heads[1].prototypes
    prototypes.data *= torch.tensor([3.0, 0.1, 1.0])  # lengths do not count
    cosines = F.cosine_similarity(features[:, None], prototypes.T, dim=2)
    torch.testing.assert_close(method.cluster_logits(features), cosines / 0.1)
    assert make_method(multiples=(2, 3)).cluster_logits(features) is None


def check_layers_of_heads(build, **predictor):
    """Check how many linear layers projector and predictor have, by `projector_layers` and with a predictor or not."""
    for layers in (2, 3):
        method = build(projector_layers=layers)
        linear = [layer for layer in method.projector if isinstance(layer, nn.Linear)]
        assert len(linear) == layers and linear[0].in_features == 4 and linear[-1].out_features == SIZE
        assert all(layer.out_features == 7 for layer in linear[:-1])
        assert isinstance(method.projector[-1], nn.Linear if layers == 2 else nn.BatchNorm1d)
        assert method.predictor is None
    with_predictor = build(**predictor).predictor
    assert [layer.out_features for layer in with_predictor if isinstance(layer, nn.Linear)] == [7, SIZE]


def test_the_projector_has_two_layers_or_three_and_the_predictor_two():
    check_layers_of_heads(build_method, predictor=True)


def test_shares_of_the_smallest_and_largest_cluster_are_logged_at_the_end_of_an_epoch(monkeypatch):
    method, logged = make_method(), {}
    monkeypatch.setattr(method, "log_dict", logged.update)
    method.pseudo_labels[0, :10] = torch.tensor([0, 1, 1, 1, 1, 1, 1, 2, 2, 2])  # the other two are not seen yet
    method.heads[0].balance.counts += 1
    method.on_train_epoch_end()
    assert logged == {"train/smallest_cluster": pytest.approx(0.1), "train/largest_cluster": pytest.approx(0.6)}
    assert not method.heads[0].balance.counts.any()


def check_clusters_in_batch_are_logged(method, monkeypatch):
    """Check the number of clusters of the first head in a batch, which is logged every three steps."""
    logged = []
    monkeypatch.setattr(method, "log", lambda name, value: logged.append((name, float(value))))
    method.losses(make_batch([0, 1, 2, 3, 4]))
    labels = (method.pseudo_labels if hasattr(method, "pseudo_labels") else method.memory.labels[..., 0])[0, :5]
    for step in range(1, 7):
        method._trainer = SimpleNamespace(global_step=step, log_every_n_steps=3)
        method.on_train_batch_end(None, None, 0)
    assert logged == [("train/clusters_in_batch", len(labels.unique()))] * 2


def test_clusters_of_a_batch_are_counted_and_logged_every_so_many_steps(monkeypatch):
    check_clusters_in_batch_are_logged(make_method(), monkeypatch)


def test_extra_images_are_refused():
    batch = make_batch([0, 1])
    batch.extra = True
    with pytest.raises(InputError, match=r"dataset\.source\.extra=\[\]"):
        make_method().losses(batch)


# Whole runs

RUN = [
    "dataset=digits",
    "trainer.max_epochs=3",
    "batch_size=450",
    "method.hidden_size=32",
    "evaluation.kmeans_restarts=1",
]
RUN += ["hardware=cpu", "pixel_baseline_max_values=0", "logger=none", "callbacks.checkpoint.min_seconds=0"]
RUN += ["callbacks.checkpoint.every_n_steps=1", "method.schedule.warmup_epochs=2"]


class StepRecorder(Callback):
    """Records epoch, frozen state, backbone weights and learning rates at every step."""

    seen: ClassVar[list] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        frozen = torch.cat([head.frozen.flatten() for head in pl_module.heads])
        weights = torch.cat([p.detach().flatten() for p in pl_module.backbone.parameters()])
        StepRecorder.seen.append((trainer.current_epoch, frozen.clone(), weights.clone(), self.rates))


def check_first_epoch_and_frozen_state(name, folder):
    """Train for three epochs of four batches, the last one of 447 images; return what StepRecorder saw."""
    StepRecorder.seen = []
    train(compose_train(f"method={name}", *RUN, f"+callbacks.recorder._target_={__name__}.StepRecorder"), folder)
    assert [epoch for epoch, *_ in StepRecorder.seen] == [0] * 4 + [1] * 4 + [2] * 4
    for before, after in zip(StepRecorder.seen, StepRecorder.seen[1:], strict=False):
        (epoch, frozen, weights, _), (next_epoch, next_frozen, next_weights, _) = before, after
        assert torch.equal(frozen, next_frozen) == (epoch == next_epoch), "frozen within an epoch, updated between two"
        assert torch.equal(weights, next_weights) == (next_epoch == 0), "the network stays in the first epoch only"
    return StepRecorder.seen


def test_network_stays_in_the_first_epoch_and_prototypes_are_frozen_within_each(tmp_path):
    seen = check_first_epoch_and_frozen_state("secu", tmp_path)
    assert [rates for *_, rates in seen[::4]] == [[0.0, 1.2], [pytest.approx(0.05), 1.2], [pytest.approx(0.2), 1.2]]
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert (state["pseudo_labels"] >= 0).all() and state["pseudo_labels"].shape == (10, 1797)
