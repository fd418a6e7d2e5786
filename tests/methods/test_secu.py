"""SeCu against a slow version of its step, and what it remembers between steps, epochs, processes and starts."""

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
from tests.conformance.adapters.secu import on_ranks
from tests.conftest import compose_train

SIZE, IMAGES = 6, 12  # features of an embedding, images


def make(*, balance="size", multiples=(1, 2), predictor=False, seed=0):
    """A SeCu of 3 and 6 clusters whose networks are linear, in float64."""
    torch.manual_seed(seed)
    backbone = nn.Linear(5, 4)
    backbone.num_features = 4
    method = SeCu(
        backbone=backbone,
        num_images=IMAGES,
        num_clusters=3,
        head_multiples=multiples,
        embedding_size=SIZE,
        hidden_size=7,
        projector_layers=2,
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
    method.projector = nn.Linear(4, SIZE)
    if predictor:
        method.predictor = nn.Linear(SIZE, SIZE)
    return at_epoch(method.double(), 0)


def at_epoch(method, epoch):
    method._trainer = SimpleNamespace(current_epoch=epoch)
    return method


def batch_of(indices, *, total=None, first=0, seed=1):
    """Two views of the images `indices`, which depend on the image and the seed only."""
    drawn = torch.randn(2, IMAGES, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    at = torch.tensor(indices)
    return TrainBatch(tuple(drawn[:, at]), at, Draws(key=(0,), first=first, total=total or len(indices)))


def slow_losses(method, batch, first):
    """Row by row, from the equations; size rule. Gives losses and labels, and changes nothing."""
    outputs = [method.projector(method.backbone(view)) for view in batch.views]
    if method.predictor:
        outputs += [method.predictor(rows) for rows in outputs]
    outputs = [F.normalize(rows, dim=1).tolist() for rows in outputs]
    representation, prototypes, labels = 0.0, 0.0, []
    heads, rows = method.each_head(), len(batch.indices)

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
            learnt = new if first else int(method.pseudo_labels[number, batch.indices[i]])
            for s in similar:
                prototypes -= log_softmax([x / 0.2 for x in s])[new]
            said = [log_softmax([x / 0.1 for x in dots(rows_of[i], frozen)]) for rows_of in outputs]
            for view, logarithms in enumerate(said):
                other = said[1 - view % 2]  # of the two projections
                for k, logarithm in enumerate(logarithms):
                    representation -= (0.3 * (k == learnt) + 0.7 * math.exp(other[k])) * logarithm
    scale = len(heads) * rows * len(outputs)
    return representation / scale, prototypes / scale, labels


@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("indices", [[0, 3, 5, 11, 2], [7]])
def test_losses_are_their_equations(predictor, indices):
    method = make(predictor=predictor)
    for epoch in (0, 1):
        batch = batch_of(indices, seed=epoch)
        expected = slow_losses(at_epoch(method, epoch), batch, epoch == 0)
        terms = method.losses(batch)
        assert terms["representation"].item() == pytest.approx(expected[0], rel=1e-9)
        assert terms["prototypes"].item() == pytest.approx(expected[1], rel=1e-9)
        assert method.pseudo_labels[:, batch.indices].tolist() == expected[2]
        for head in method.each_head():
            head.prototypes.data += 0.5 * torch.randn_like(head.prototypes)  # frozen ones now differ


def test_each_loss_moves_its_own_part():
    method, batch = make(), batch_of([0, 1, 2, 3])
    networks = [*method.backbone.parameters(), *method.projector.parameters()]
    prototypes = [head.prototypes for head in method.each_head()]
    terms = method.losses(batch)
    for term, moved, still in (("representation", networks, prototypes), ("prototypes", prototypes, networks)):
        gradients = torch.autograd.grad(terms[term], moved + still, allow_unused=True, retain_graph=True)
        assert all(g is not None and g.abs().sum() > 0 for g in gradients[: len(moved)])
        assert all(g is None for g in gradients[len(moved) :])


def test_prototype_gradient_is_stable():
    """-(1 - q) at the label, nothing elsewhere; so prototypes without members stand still, and none changes length."""
    logits = torch.randn(2, 8, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 1, 3, 3, 0])
    losses = stable_cross_entropies(logits, labels)
    plain = F.cross_entropy(logits.flatten(0, 1), labels.repeat(2), reduction="none").view(2, 8)
    torch.testing.assert_close(losses, plain)
    losses.sum().backward()
    own = F.one_hot(labels, 5).double()
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(2) - 1) * own)

    method, batch = make(), batch_of([0, 1, 2, 3])
    method.losses(batch)["prototypes"].backward()
    for head, assigned in zip(method.each_head(), method.pseudo_labels[:, batch.indices], strict=True):
        empty = torch.bincount(assigned, minlength=head.prototypes.shape[1]) == 0
        assert not head.prototypes.grad[:, empty].any() and head.prototypes.grad[:, ~empty].abs().sum(0).min() > 0
        along = (head.prototypes.grad * head.prototypes).sum(0)
        assert along.abs().max() < 1e-12


def test_views_may_be_swapped():
    batch = batch_of([0, 4, 8])
    swapped = batch.replace_views(*reversed(batch.views))
    for term, value in make().losses(batch).items():
        torch.testing.assert_close(make().losses(swapped)[term], value)


def test_losses_are_full_precision_under_autocast():
    method, outputs = make().float(), torch.randn(2, 4, SIZE)
    exact = copy.deepcopy(method).objective(outputs, torch.arange(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = method.objective(outputs, torch.arange(4))
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("balance", ["size", "entropy"])
def test_an_image_not_seen_before_learns_its_new_label(balance):
    method = make(balance=balance)
    method.losses(batch_of([0, 1, 2, 3]))
    terms = at_epoch(method, 1).losses(batch_of([2, 3, 4, 5], seed=2))
    assert all(torch.isfinite(t) for t in terms.values())
    assert (method.pseudo_labels[:, :6] >= 0).all() and (method.pseudo_labels[:, 6:] == -1).all()
    if balance == "entropy":
        counted = [
            torch.bincount(row[row >= 0], minlength=k) for row, k in zip(method.pseudo_labels, (3, 6), strict=True)
        ]
        for head, expected in zip(method.each_head(), counted, strict=True):
            assert head.balance.counts.tolist() == expected.tolist()


@pytest.mark.parametrize("balance", ["size", "entropy"])
def test_processes_together_are_one(balance):
    """Uneven shares, a share of nothing, and images that move from one process to another between epochs."""
    acquire_run_lock, ranks = make(balance=balance), [make(balance=balance) for _ in range(3)]
    everything = list(range(10))
    for epoch, cuts in enumerate([(0, 3, 7, 10), (0, 6, 6, 10), (0, 1, 5, 10)]):
        order = everything if epoch % 2 == 0 else everything[::-1]

        def step(rank, order=order, epoch=epoch, cuts=cuts):
            mine = order[cuts[rank] : cuts[rank + 1]]
            method = at_epoch(ranks[rank], epoch)
            batch = (
                batch_of(mine, total=len(order), first=cuts[rank], seed=epoch) if mine else nothing(epoch, len(order))
            )
            method.zero_grad()
            sum(method.losses(batch).values()).backward()
            return [p.grad for p in method.parameters()]

        gradients = on_ranks(step, 3)
        acquire_run_lock.zero_grad()
        sum(at_epoch(acquire_run_lock, epoch).losses(batch_of(order, seed=epoch)).values()).backward()
        for parameter, *theirs in zip(acquire_run_lock.parameters(), *gradients, strict=True):
            torch.testing.assert_close(sum(theirs) / 3, parameter.grad, rtol=1e-9, atol=1e-12)
        for method in ranks:
            for name, value in acquire_run_lock.named_buffers():
                torch.testing.assert_close(method.get_buffer(name), value, msg=lambda m, n=name: f"{n}: {m}")


def nothing(seed, total):
    batch = batch_of([0], seed=seed)
    draws = Draws(key=(0,), first=0, total=total)
    return TrainBatch(tuple(view[:0] for view in batch.views), batch.indices[:0], draws)


def test_groups_hold_the_prototypes_apart():
    networks, prototypes = make(predictor=True).parameter_groups()
    assert prototypes["lr"] == 0.7 and [tuple(p.shape) for p in prototypes["params"]] == [(SIZE, 3), (SIZE, 6)]
    assert len(networks["params"]) == 6


def test_clusters_are_those_of_the_head_of_k():
    method = make(multiples=(2, 1))
    features = method.encode(torch.randn(4, 5, dtype=torch.float64))
    head = method.each_head()[1]
    nearest = (features @ F.normalize(head.prototypes, dim=0)).argmax(1)
    assert torch.equal(method.cluster_logits(features).argmax(1), nearest)
    assert make(multiples=(2, 3)).cluster_logits(features) is None


def test_extra_images_are_refused_in_words():
    batch = batch_of([0, 1])
    batch.extra = True
    with pytest.raises(InputError, match=r"dataset\.source\.extra=\[\]"):
        make().losses(batch)


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


class Watch(Callback):
    """Rates and frozen state at every step; and that the network stands still in the first epoch."""

    seen: ClassVar[list] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        frozen = torch.cat([head.frozen.flatten() for head in pl_module.each_head()])
        weights = torch.cat([p.detach().flatten() for p in pl_module.backbone.parameters()])
        Watch.seen.append((trainer.current_epoch, frozen.clone(), weights.clone(), self.rates))


def check_epochs(name, folder):
    """What Watch saw of a run of three epochs of four batches, the last of them 447 images."""
    Watch.seen = []
    train(compose_train(f"method={name}", *RUN, f"+callbacks.watch._target_={__name__}.Watch"), folder)
    assert [epoch for epoch, *_ in Watch.seen] == [0] * 4 + [1] * 4 + [2] * 4
    for (epoch, frozen, weights, _), (following, later, moved, _) in zip(Watch.seen, Watch.seen[1:], strict=False):
        assert torch.equal(frozen, later) == (epoch == following), "frozen within an epoch, renewed between two"
        assert torch.equal(weights, moved) == (following == 0), "still in the first epoch only"
    return Watch.seen


def test_first_epoch_is_dead_and_prototypes_are_frozen_within_each(tmp_path):
    seen = check_epochs("secu", tmp_path)
    assert [rates for *_, rates in seen[::4]] == [[0.0, 1.2], [pytest.approx(0.05), 1.2], [pytest.approx(0.2), 1.2]]
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert (state["pseudo_labels"] >= 0).all() and state["pseudo_labels"].shape == (10, 1797)
