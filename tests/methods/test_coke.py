"""CoKe: its step against a slow version, and its state across steps, epochs and processes."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclust.clustering.balanced_assignment import SizeConstraint
from deepclust.errors import InputError
from deepclust.methods.coke import CentroidHead, CoKe, PseudoLabelMemory, averaging_weight
from deepclust.nn.schedules import Constant
from tests.conformance.adapters.secu import run_on_ranks
from tests.methods.test_secu import (
    IMAGES,
    SIZE,
    check_clusters_in_batch_are_logged,
    check_first_epoch_and_frozen_state,
    check_layers_of_heads,
    make_batch,
    make_empty_batch,
    set_epoch,
)


def make_method(*, predictor_weight=0.0, **options):
    """A CoKe of 3 and 6 clusters whose networks are linear, in float64."""
    method = build_method(predictor_weight=predictor_weight, **options)
    method.projector = nn.Linear(4, SIZE)
    if predictor_weight:
        method.predictor = nn.Linear(SIZE, SIZE)
    return set_epoch(method.double(), 0)


def build_method(
    *, multiples=(1, 2), predictor_weight=0.0, epochs=100, averaging_epochs=0, num_slots=1, seed=0, projector_layers=2
):
    """A CoKe of 3 and 6 clusters with its own projector and predictor."""
    torch.manual_seed(seed)
    backbone = nn.Linear(5, 4)
    backbone.num_features = 4
    return CoKe(
        backbone=backbone,
        num_images=IMAGES,
        num_clusters=3,
        head_multiples=multiples,
        embedding_size=SIZE,
        hidden_size=7,
        projector_layers=projector_layers,
        predictor_weight=predictor_weight,
        small_crops_weight=0.4,
        temperature=0.1,
        label_weight=0.3,
        dual_step=0.5,
        min_share=0.9,
        epochs=epochs,
        averaging_epochs=averaging_epochs,
        num_slots=num_slots,
        label_temperature=0.5,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        schedule=Constant(),
        e_step_every_n_epochs=0,
    )


def make_batch_of_views(indices, number, seed):
    """Return a batch with `number` views of the images `indices`."""
    batch = make_batch(indices, seed=seed)
    more = make_batch(indices, seed=seed + 100).views + make_batch(indices, seed=seed + 200).views
    return batch.replace_views(*(batch.views + more)[:number])


def slow_step(method, batch, first):
    """Return the loss, assignments and centroids of a step without averaging, image by image from the equations.

    It changes nothing in `method`.
    """
    projections = [method.projector(method.backbone(view)) for view in batch.views]
    predictions = [method.predictor(rows) for rows in projections] if method.predictor else None
    z = torch.stack([F.normalize(rows, dim=1) for rows in projections]).detach()
    p = torch.stack([F.normalize(rows, dim=1) for rows in predictions]).detach() if predictions else None
    features = z[:2].mean(0)
    total, labels, centroids = 0.0, [], []
    for number, head in enumerate(method.heads):
        scores = features @ head.running + head.balance.duals
        new = [row.tolist().index(max(row.tolist())) for row in scores]
        labels.append(new)
        after = head.running.clone()
        for k in set(new):
            members = [features[i] for i, label in enumerate(new) if label == k]
            before = float(head.balance.counts[k])
            mean = (before * head.running[:, k] + sum(members)) / (before + len(members))
            after[:, k] = mean / mean.norm()
        centroids.append(after)
        for i in range(len(new)):
            label = new[i] if first else int(method.memory.labels[number, batch.indices[i], 0])
            one_hot = F.one_hot(torch.tensor(label), after.shape[1]).double()
            probabilities = [(z[v, i] @ head.frozen / 0.1).softmax(0) for v in range(min(2, len(z)))]
            targets = [one_hot]
            if len(z) > 1:
                targets = [0.3 * one_hot + 0.7 * probabilities[1], 0.3 * one_hot + 0.7 * probabilities[0]]

            def loss(view, target, i=i, head=head):
                def cross_entropy(values):
                    return -float((target * (values @ head.frozen / 0.1).log_softmax(0)).sum())

                beta = method.predictor_weight
                predicted = beta * cross_entropy(p[view, i]) if p is not None else 0.0
                return (1 - beta) * cross_entropy(z[view, i]) + predicted

            large = sum(loss(v, t) for v, t in enumerate(targets)) / len(targets)
            small = [loss(v, sum(targets) / 2) for v in range(2, len(z))]
            total += 0.6 * large + 0.4 * sum(small) / len(small) if small else large
    return total / len(method.heads) / len(batch.indices), labels, centroids


@pytest.mark.parametrize("views", [1, 2, 5])
@pytest.mark.parametrize("predictor_weight", [0.0, 0.5, 1.0])
def test_loss_and_clustering_are_their_equations(views, predictor_weight):
    method = make_method(predictor_weight=predictor_weight)
    for epoch, indices in enumerate(([0, 3, 5, 11, 2], [11, 0])):
        batch = make_batch_of_views(indices, views, seed=epoch)
        loss, labels, centroids = slow_step(set_epoch(method, epoch), batch, epoch == 0)
        assert method.losses(batch)["classification"].item() == pytest.approx(loss, rel=1e-9)
        assert method.memory.labels[:, batch.indices, 0].tolist() == labels
        for head, expected in zip(method.heads, centroids, strict=True):
            torch.testing.assert_close(head.running, expected)


def test_networks_get_gradients_and_clustering_state_gets_none():
    method = make_method(predictor_weight=0.5)
    method.losses(make_batch([0, 1, 2, 3]))["classification"].backward()
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())
    assert all(buffer.grad is None for buffer in method.buffers())


def test_first_features_of_an_epoch_replace_the_inherited_centroid():
    head = CentroidHead(num_features=2, balance=SizeConstraint(num_clusters=2, step=0.1, min_share=0.5))
    start = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    head.running.copy_(start)
    head.update(torch.tensor([[0.0, 3.0]]), torch.tensor([0]), averaging=False)
    torch.testing.assert_close(head.running, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    head.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), averaging=False)
    torch.testing.assert_close(head.running[:, 0], torch.tensor([0.5, 0.5]) * 2**0.5)
    assert torch.equal(head.running[:, 1], start[:, 1]), "a cluster without features keeps its centroid"
    head.freeze_centroids_and_reset_counts(1.0, averaging=False)
    torch.testing.assert_close(head.frozen, head.running)
    assert not head.balance.counts.any()


def test_without_averaging_the_running_centroids_are_frozen_unchanged():
    head = CentroidHead(num_features=2, balance=SizeConstraint(num_clusters=2, step=0.1, min_share=0.5))
    running = torch.tensor([[3.0, 0.0], [4.0, 0.5]])
    head.running.copy_(running)
    head.freeze_centroids_and_reset_counts(1.0, averaging=False)
    assert torch.equal(head.frozen, running) and torch.equal(head.running, running)


def test_averaging_gives_epochs_equal_weights():
    assert [averaging_weight(epoch, 5) for epoch in (0, 4, 5, 6, 7)] == [1, 1, 1, 1 / 2, 1 / 3]
    head = CentroidHead(num_features=2, balance=SizeConstraint(num_clusters=1, step=0.1, min_share=0.5))
    head.frozen.copy_(torch.tensor([[1.0], [0.0]]))
    head.running.copy_(torch.tensor([[0.0], [2.0]]))
    head.freeze_centroids_and_reset_counts(0.25, averaging=True)
    torch.testing.assert_close(head.frozen, F.normalize(torch.tensor([[0.75], [0.25]]), dim=0))
    assert torch.equal(head.frozen, head.running)


def make_memory(slots, averaging_epoch):
    return PseudoLabelMemory(num_heads=1, num_images=1, num_slots=slots, averaging_epoch=averaging_epoch)


def run_through_memory(memory, labels, clusters=4):
    """Return the targets (E, K) of one image that gets the pseudo-labels `labels`, one in each epoch."""
    targets, image = [], torch.tensor([0])
    for epoch, label in enumerate(labels):
        targets.append(memory.read_targets(0, image, clusters, epoch=epoch, temperature=0.5)[0])
        memory.write(0, image, torch.tensor([label]), epoch=epoch)
    return torch.stack(targets)


def test_labels_are_averaged_if_the_slots_suffice():
    labels = [0, 3, 1, 2, 1, 1, 3, 2]
    got = run_through_memory(make_memory(4, averaging_epoch=2), labels)
    assert got[0].isnan().all()
    for epoch in (1, 2, 3):  # the targets are one-hot up to the label of the first averaged epoch
        assert got[epoch].tolist() == [float(k == labels[epoch - 1]) for k in range(4)]
    for epoch in range(4, len(labels)):
        since = labels[2:epoch]
        shares = [since.count(k) / len(since) for k in range(4)]
        exponentials = [math.exp(s / 0.5) if s else 0.0 for s in shares]
        expected = [e / sum(exponentials) for e in exponentials]
        assert got[epoch].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_full_table_drops_its_lightest_label():
    memory = make_memory(2, averaging_epoch=0)
    # After three epochs label 1 weighs two thirds and label 2 one third. Label 3 replaces label 2; it is one of four.
    run_through_memory(memory, [1, 1, 2, 3])
    assert sorted(memory.labels[0, 0].tolist()) == [1, 3]
    assert float(memory.weights.sum()) == pytest.approx(1)
    assert float(memory.weights[0, 0][memory.labels[0, 0] == 3]) == pytest.approx(1 / 4)


def test_of_slots_with_equal_weights_the_same_is_overwritten_as_in_the_authors_code():
    """Labels 6 and 2 had two epochs each. The expected labels were read off a float32 run of the authors' code."""
    memory = make_memory(3, averaging_epoch=2)
    run_through_memory(memory, [6, 2, 6, 2, 1, 1, 3, 0, 6, 6, 0], clusters=7)
    assert memory.labels[0, 0].tolist() == [0, 2, 1]


def test_one_slot_keeps_the_last_label():
    labels = [0, 3, 1, 2, 1]
    got = run_through_memory(make_memory(1, averaging_epoch=1), labels)
    assert got[1:].argmax(1).tolist() == labels[:-1] and set(got[1:].flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("epoch", [1, 7, 8, 9])
def test_an_image_not_seen_before_learns_its_new_label(epoch):
    """This holds while labels are averaged too (from epoch 7 on), for images first seen then or never."""
    method = make_method(epochs=10, averaging_epochs=3, num_slots=3)
    method.losses(make_batch_of_views([0, 1, 2, 3], 1, seed=0))
    loss = set_epoch(method, epoch).losses(make_batch_of_views([2, 3, 4, 5], 1, seed=1))["classification"]
    assert torch.isfinite(loss)
    assert (method.memory.labels[:, :6, 0] >= 0).all() and (method.memory.labels[:, 6:] == -1).all()


def test_averaged_epochs_assign_by_the_frozen_centroids():
    method = make_method(epochs=10, averaging_epochs=3, num_slots=3)
    for head in method.heads:
        head.running.copy_(head.frozen.flip(1))
    batch = make_batch_of_views([0, 1, 2, 3], 1, seed=0)
    rows = method.encode(batch.views[0])
    for epoch, by in ((6, "running"), (7, "frozen")):
        trial = set_epoch(copy.deepcopy(method), epoch)
        trial.losses(batch)
        for head, labels in zip(method.heads, trial.memory.labels[:, batch.indices, 0], strict=True):
            assert torch.equal(labels, (rows @ getattr(head, by)).argmax(1))


def test_losses_are_full_precision_under_autocast():
    method, outputs = make_method().float(), torch.randn(2, 4, SIZE)
    exact = copy.deepcopy(method).compute_terms_and_update_clusters(outputs, None, torch.arange(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method.compute_terms_and_update_clusters(outputs, None, torch.arange(4)), exact)


def test_processes_together_are_one():
    """Also if processes hold unequal parts, or nothing, and if images change their process between epochs."""
    single, ranks = make_method(), [make_method() for _ in range(3)]
    for epoch, cuts in enumerate([(0, 3, 7, 10), (0, 6, 6, 10), (0, 1, 5, 10)]):
        order = list(range(10))[:: 1 if epoch % 2 == 0 else -1]

        def compute_gradients(rank, order=order, epoch=epoch, cuts=cuts):
            indices = order[cuts[rank] : cuts[rank + 1]]
            method = set_epoch(ranks[rank], epoch)
            if indices:
                batch = make_batch(indices, total=10, first=cuts[rank], seed=epoch)
            else:
                batch = make_empty_batch(epoch, 10)
            method.zero_grad()
            method.losses(batch)["classification"].backward()
            return [p.grad for p in method.parameters()]

        gradients = run_on_ranks(compute_gradients, 3)
        single.zero_grad()
        set_epoch(single, epoch).losses(make_batch(order, seed=epoch))["classification"].backward()
        for parameter, *rank_gradients in zip(single.parameters(), *gradients, strict=True):
            torch.testing.assert_close(sum(rank_gradients) / 3, parameter.grad, rtol=1e-9, atol=1e-12)
        for method in (single, *ranks):
            for head in method.heads:
                head.freeze_centroids_and_reset_counts(1.0, averaging=False)
            for name, value in single.named_buffers():
                torch.testing.assert_close(method.get_buffer(name), value, msg=lambda m, n=name: f"{n}: {m}")


def test_clusters_are_those_of_the_head_of_k():
    method = make_method(multiples=(2, 1))
    features = method.encode(torch.randn(4, 5, dtype=torch.float64))
    centroids = method.heads[1].running
    centroids *= torch.tensor([3.0, 0.1, 1.0])  # lengths do not count
    cosines = F.cosine_similarity(features[:, None], centroids.T, dim=2)
    torch.testing.assert_close(method.cluster_logits(features), cosines / 0.1)
    assert make_method(multiples=(2, 3)).cluster_logits(features) is None


def test_the_projector_has_two_layers_or_three_and_the_predictor_two():
    check_layers_of_heads(build_method, predictor_weight=0.5)


def test_shares_of_the_smallest_and_largest_cluster_are_logged_at_the_end_of_an_epoch(monkeypatch):
    method, logged = make_method(), {}
    monkeypatch.setattr(method, "log_dict", logged.update)
    method.heads[0].balance.counts.copy_(torch.tensor([1.0, 6.0, 3.0]))
    method.on_train_epoch_end()
    assert logged == {"train/smallest_cluster": pytest.approx(0.1), "train/largest_cluster": pytest.approx(0.6)}
    assert not method.heads[0].balance.counts.any()


def test_clusters_of_a_batch_are_counted_and_logged_every_so_many_steps(monkeypatch):
    check_clusters_in_batch_are_logged(make_method(), monkeypatch)


def test_extra_images_are_refused():
    batch = make_batch([0, 1])
    batch.extra = True
    with pytest.raises(InputError, match=r"dataset\.source\.extra=\[\]"):
        make_method().losses(batch)


def test_network_stays_in_the_first_epoch_and_centroids_are_frozen_within_each(tmp_path):
    check_first_epoch_and_frozen_state("coke", tmp_path)
