"""Self-EvoC: what each epoch of a round trains and on which images, the target, the stop, and runs that go on."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from torch import nn
from torch.nn.functional import log_softmax

from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.student_assignments import student_logits, target_distribution, target_divergence
from deepclust.commands.train import run
from deepclust.errors import InputError
from deepclust.methods.self_evoc import SelfEvoC, classifier_targets
from deepclust.nn.schedules import Constant
from tests.conftest import compose_train
from tests.processes import TWO_PROCESSES, run_deepclust

SIZE, M, K = 3, 40, 4
NO_EPOCH = -1


def make_network(in_features, out_features):
    network = nn.Linear(in_features, out_features)
    network.num_features = out_features
    return network


def make_method(**numbers):
    """Return Self-EvoC on vectors of five numbers, with rounds of two epochs and one, before its first epoch."""
    torch.manual_seed(0)
    arguments = {"reconstruction_weight": 0.1, "min_confidence": 0.6, "stop_below": 0.001, **numbers}
    method = SelfEvoC(
        backbone=make_network(5, SIZE),
        decoder=make_network(SIZE, 5),
        classifier=make_network(5, 6),
        num_images=M,
        num_clusters=K,
        fuzzifier=2.0,
        certainty="entropy",
        first_share=0.2,
        share_growth=0.1,
        largest_share=0.45,
        least_reliable=1,
        label_smoothing=0.1,
        target_temperature=2.0,
        even=True,
        alpha=1.0,
        classifier_epochs=2,
        clustering_epochs=1,
        stop_after_rounds=2,
        kmeans_restarts=2,
        kmeans_max_iterations=50,
        kmeans_tolerance=0.0,
        optimizer=partial(torch.optim.Adam, lr=0.1),
        classifier_optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        schedule=Constant(),
        **arguments,
    )
    set_epoch(method, 0)
    return method


def set_epoch(method, epoch):
    method._trainer = SimpleNamespace(current_epoch=epoch, should_stop=False)


def make_batch(clean, augmented, indices, extra=False):
    return TrainBatch((clean, augmented), indices, Draws((0,), 0, len(clean)), extra)


# One step


def test_the_classifier_learns_the_clusters_on_augmented_views():
    method = make_method()
    method.e_step(torch.randn(M, SIZE), ("test",))
    clean, augmented, indices = torch.randn(7, 5), torch.randn(7, 5), torch.randperm(M)[:7]
    for epoch, is_trained in [(0, True), (1, True), (2, False), (3, True), (5, False)]:
        set_epoch(method, epoch)
        assert ("classification" in method.losses(make_batch(clean, augmented, indices))) == is_trained
    set_epoch(method, 4)
    terms = method.losses(make_batch(clean, augmented, indices))
    log_p = log_softmax(method.classifier(augmented), 1)
    labels = 0.9 * nn.functional.one_hot(method.assignments[indices], K) + 0.1 / K
    assert terms.keys() == {"classification"}
    torch.testing.assert_close(terms["classification"], -(labels * log_p).sum(1).mean())


def test_the_clustering_network_learns_the_targets_on_clean_views():
    method = make_method(reconstruction_weight=2.0)
    method.e_step(torch.randn(M, SIZE), ("test",))
    set_epoch(method, 2)
    clean, indices = torch.randn(7, 5), torch.randperm(M)[:7]
    terms = method.losses(make_batch(clean, torch.randn(7, 5), indices))
    z = method.backbone(clean)
    divergence = target_divergence(method.targets[indices], student_logits(z, method.centres, alpha=1.0))
    torch.testing.assert_close(terms["clustering"], divergence)
    torch.testing.assert_close(terms["reconstruction"], 2 * (method.decoder(z) - clean).square().mean())
    assert make_method(reconstruction_weight=0.0).decoder is None


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epoch_moves_one_of_the_two_networks_only(epoch):
    method = make_method()
    method.e_step(torch.randn(M, SIZE), ("test",))
    optimizer = method.make_optimizer(method.parameter_groups())
    for current, moves in [(0, None), (2, None), (epoch, True)]:  # first, both optimisers get momentum
        set_epoch(method, current)
        before = {name: p.detach().clone() for name, p in method.named_parameters()}
        sum(method.losses(make_batch(torch.randn(7, 5), torch.randn(7, 5), torch.arange(7))).values()).backward()
        assert all(p.grad is not None for p in method.parameters()), "which DDP expects"
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        changed = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
        if moves:
            assert changed == {n for n in before if n.startswith("classifier") == (epoch == 1)}


# The E-step


def test_a_round_begins_with_its_share_of_reliable_images_which_are_drawn_evenly():
    method = make_method()
    features = torch.randn(M, SIZE)
    assert method.cluster_logits(features) is None
    for share in (0.3, 0.4, 0.45, 0.45):
        method.e_step(features, ("test",))
        sizes = torch.bincount(method.assignments, minlength=K)
        reliable = torch.bincount(method.assignments[method.is_reliable], minlength=K)
        largest = int(sizes.double().quantile(0.5))
        assert reliable.tolist() == [min(max(int(share * n), 1), largest) for n in sizes.tolist()]
        weights = method.sampling_weights()
        assert torch.equal(weights > 0, method.is_reliable)
        sums = torch.zeros(K).index_add_(0, method.assignments, weights)
        torch.testing.assert_close(sums, torch.ones(K))
    set_epoch(method, 2)
    assert method.sampling_weights() is None
    assert torch.equal(method.cluster_logits(features).argmax(1), method.assignments)


def test_training_stops_after_two_stable_rounds_in_a_row():
    method = make_method(stop_below=2 / M)
    assignments = torch.arange(M) % K
    for num_changed, stops in [(0, False), (1, False), (2, False), (1, False), (0, True)]:
        assignments = assignments.clone()
        assignments[:num_changed] = (assignments[:num_changed] + 1) % K
        method.rounds_begun += 1
        method.renew_assignments(assignments)
        assert int(method.num_changed) == num_changed and method.has_converged() == stops
    method.on_train_start()
    assert method.trainer.should_stop


# The target


@pytest.mark.parametrize("even", [True, False])
def test_target_by_hand(even):
    logits = torch.randn(6, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = (logits / 2).exp()
    p /= p.sum(1, keepdim=True)
    if even:
        p /= p.sum(0)
        p /= p.sum(1, keepdim=True)
    torch.testing.assert_close(classifier_targets(logits, temperature=2.0, even=even), p)
    logits[:, 0] = -1e6
    assert classifier_targets(logits, temperature=2.0, even=even).isfinite().all()


def test_an_unsure_classifier_leaves_the_target_and_the_first_is_that_of_dec():
    method = make_method()
    features = torch.randn(M, SIZE)
    method.e_step(features, ("test",))
    first = target_distribution(student_logits(features, method.centres, alpha=1.0).softmax(1))
    torch.testing.assert_close(method.targets, first.detach())
    method.renew_targets(torch.zeros(M, K))
    assert float(method.confidence) == pytest.approx(1 / K)
    torch.testing.assert_close(method.targets, first.detach())
    logits = 5.0 * nn.functional.one_hot(method.assignments, K) * method.is_reliable[:, None]
    method.renew_targets(logits)
    torch.testing.assert_close(method.targets, classifier_targets(logits, temperature=2.0, even=True))
    agreeing = (method.assignments == torch.where(method.is_reliable, method.assignments, 0)).float().mean()
    assert float(method.agreement) == pytest.approx(float(agreeing))


def test_errors_say_what_to_start_from():
    method = make_method()
    with pytest.raises(InputError, match="start and before are null"):
        method.on_train_start()
    with pytest.raises(InputError, match="no decoder to train on"):
        method.start_from(make_method(reconstruction_weight=0.0))
    method.start_from(make_method())
    method.on_train_start()
    with pytest.raises(InputError, match="extra images"):
        method.losses(make_batch(torch.randn(4, 5), torch.randn(4, 5), torch.arange(4), extra=True))


# Whole runs on the digits


class WatchEpochs(Callback):
    """Notes for each epoch its images, the reliable ones and the targets; may interrupt in the middle of an epoch."""

    interrupt_in = NO_EPOCH

    def __init__(self):
        WatchEpochs.images, WatchEpochs.reliable, WatchEpochs.targets = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not isinstance(pl_module, SelfEvoC):  # the stage before
            return
        if batch_idx == 0 or not WatchEpochs.images:  # a run that goes on begins within an epoch
            WatchEpochs.images.append([])
            WatchEpochs.reliable.append(set(pl_module.is_reliable.nonzero()[:, 0].tolist()))
            WatchEpochs.targets.append(pl_module.targets.clone())
        WatchEpochs.images[-1] += batch.indices.tolist()
        if trainer.current_epoch == WatchEpochs.interrupt_in and batch_idx == 2:
            raise KeyboardInterrupt


ROUNDS = ["trainer.max_epochs=5", "method.classifier_epochs=1", "method.clustering_epochs=1", "method.stop_below=0"]
SMALL = [f"{place}.backbone.hidden_sizes=[32]" for place in ("method", "before.method")]
SMALL += ["before.trainer.max_epochs=3", "report.map_points=0", "pixel_baseline_max_values=0", "backbone.widths=[8,8]"]
SAVES = ["callbacks.checkpoint.min_seconds=0", "callbacks.checkpoint.every_n_steps=1", "~callbacks.evaluation"]


def compose_run(*overrides):
    watch = "+callbacks.watch._target_=tests.methods.test_self_evoc.WatchEpochs"
    return compose_train("method=self_evoc", "hardware=cpu", *ROUNDS, *SMALL, *SAVES, watch, *overrides)


def read_state(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_epochs_alternate_and_an_interrupted_run_ends_as_the_whole_one(tmp_path):
    run(compose_run(), tmp_path / "whole")
    images, reliable, targets = WatchEpochs.images, WatchEpochs.reliable, WatchEpochs.targets
    assert len(images) == 5
    for epoch in range(5):
        if epoch % 2 == 0:
            assert len(images[epoch]) == 1797 and set(images[epoch]) <= reliable[epoch]
        else:
            assert sorted(images[epoch]) == list(range(1797)) and reliable[epoch] == reliable[epoch - 1]
    assert torch.equal(targets[1], targets[2]) and torch.equal(targets[3], targets[4])
    state = read_state(tmp_path / "whole")
    assert int(state["rounds_begun"]) == 3 and len(reliable[4]) > len(reliable[0])
    for epoch in (2, 3):  # of the classifier, and of the clustering network
        folder, start = tmp_path / str(epoch), f"start={tmp_path / 'whole' / 'before'}"
        WatchEpochs.interrupt_in = epoch
        try:
            with pytest.raises(KeyboardInterrupt):
                run(compose_run(start), folder)
        finally:
            WatchEpochs.interrupt_in = NO_EPOCH
        run(compose_run(start), folder)
        for name, value in state.items():
            assert torch.equal(read_state(folder)[name], value), name


def test_a_run_stops_by_itself_when_rounds_are_stable(tmp_path):
    still = ["method.stop_below=1.0", "method.optimizer.lr=1e-9", "trainer.max_epochs=40"]
    run(compose_run(*still), tmp_path)
    assert len(WatchEpochs.images) == 4, "two rounds, and a third that only begins"
    state = read_state(tmp_path)
    assert int(state["rounds_begun"]) == 3 and int(state["stable_rounds"]) == 2
    (tmp_path / "results.json").unlink()  # as if it had been killed while the report was written
    run(compose_run(*still), tmp_path)
    assert WatchEpochs.images == [], "no step after the stop"


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_in_whole_rounds(tmp_path):
    common = ["method=self_evoc", *ROUNDS, *SMALL, "hardware.precision=64-true", "sync_batchnorm=true"]
    common += ["batch_size=600", "method.min_confidence=0", "before.trainer.max_epochs=1"]
    run_deepclust("train", *common, "hardware=cpu", f"hydra.run.dir={tmp_path / 'one'}")
    start = f"start={tmp_path / 'one' / 'before'}"
    run_deepclust("train", *common, *TWO_PROCESSES, start, f"hydra.run.dir={tmp_path / 'two'}")
    for name, value in read_state(tmp_path / "one").items():
        torch.testing.assert_close(
            read_state(tmp_path / "two")[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
