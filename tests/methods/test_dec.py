"""DEC and IDEC: the target against a slow version, when it is renewed, the order of the images, and the stop."""

from functools import partial

import pytest
import torch
from lightning import Callback
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.student_assignments import student_logits, target_distribution, target_divergence
from deepclust.commands.train import run
from deepclust.errors import InputError
from deepclust.methods.dec import DEC
from deepclust.nn.schedules import Constant
from deepclust.runs.checkpoint import load_checkpoint, load_method
from tests.conftest import compose_train

SIZE, M, K = 3, 40, 4
NO_LIMIT = 10**6


def make_network(in_features, out_features):
    network = nn.Linear(in_features, out_features)
    network.num_features = out_features
    return network


def make_method(*, reconstruction_weight=0.0, clustering_weight=1.0, stop_below=0.001):
    """Return DEC on vectors of five numbers."""
    torch.manual_seed(0)
    return DEC(
        backbone=make_network(5, SIZE),
        decoder=make_network(SIZE, 5),
        num_images=M,
        num_clusters=K,
        alpha=1.0,
        clustering_weight=clustering_weight,
        reconstruction_weight=reconstruction_weight,
        target_every_n_steps=3,
        stop_below=stop_below,
        shuffle=False,
        kmeans_restarts=2,
        kmeans_max_iterations=50,
        kmeans_tolerance=0.0,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        schedule=Constant(),
    )


def make_batch(images, indices, extra=False):
    return TrainBatch((images,), indices, Draws((0,), 0, len(images)), extra)


# The assignments and their target


def test_assignments_target_and_divergence_by_hand():
    torch.manual_seed(1)
    alpha = 2.0
    z, centres = torch.randn(6, SIZE, dtype=torch.float64), torch.randn(K, SIZE, dtype=torch.float64)
    q = torch.zeros(6, K, dtype=torch.float64)
    for i in range(6):
        for j in range(K):
            q[i, j] = (1 + float(((z[i] - centres[j]) ** 2).sum()) / alpha) ** (-(alpha + 1) / 2)
        q[i] /= q[i].sum()
    p = torch.stack([torch.stack([q[i, j] ** 2 / q[:, j].sum() for j in range(K)]) for i in range(6)])
    p /= p.sum(1, keepdim=True)
    logits = student_logits(z, centres, alpha=alpha)
    torch.testing.assert_close(logits.softmax(1), q)
    torch.testing.assert_close(target_distribution(q), p)
    expected = sum(float(p[i, j] * (p[i, j] / q[i, j]).log()) for i in range(6) for j in range(K)) / 6
    assert float(target_divergence(p, logits)) == pytest.approx(expected)


def test_an_empty_cluster_has_no_target_and_far_images_have_finite_losses():
    q = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]])
    p = target_distribution(q)
    assert not p[:, 2].any() and p.isfinite().all()
    z = torch.full((2, SIZE), 1e15).requires_grad_()
    loss = target_divergence(p, student_logits(z, torch.zeros(3, SIZE), alpha=1.0))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


# One step and the state


def test_losses_read_the_targets_of_the_images_and_send_no_gradient_into_them():
    method = make_method(reconstruction_weight=2.0, clustering_weight=0.1)
    features = torch.randn(M, SIZE)
    method.e_step(features, ("test",))
    images, indices = torch.randn(7, 5), torch.randperm(M)[:7]
    terms = method.losses(make_batch(images, indices))
    z = method.backbone(images)
    logits = student_logits(z, method.centres, alpha=1.0)
    torch.testing.assert_close(terms["clustering"], 0.1 * target_divergence(method.targets[indices], logits))
    torch.testing.assert_close(terms["reconstruction"], 2 * (method.decoder(z) - images).square().mean())
    assert not method.targets.requires_grad


def test_dec_has_no_decoder_and_idec_trains_it():
    dec, idec = make_method(), make_method(reconstruction_weight=1.0)
    assert not any(name.startswith("decoder") for name, _ in dec.named_parameters())
    assert any(name.startswith("decoder") for name, _ in idec.named_parameters())
    for method in (dec, idec):
        method.e_step(torch.randn(M, SIZE), ("test",))
        assert set(method.losses(make_batch(torch.randn(4, 5), torch.arange(4)))) == (
            {"clustering"} if method is dec else {"clustering", "reconstruction"}
        )


def test_kmeans_sets_the_centres_once_and_the_first_target_never_stops():
    method = make_method(stop_below=1.0)
    features = torch.randn(M, SIZE)
    assert method.cluster_logits(features) is None
    method.e_step(features, ("test",))
    centres = method.centres.detach().clone()
    assert int(method.num_changed) == 0 and not method.has_converged
    torch.testing.assert_close(method.targets.sum(1), torch.ones(M))
    torch.testing.assert_close(method.assignments, torch.cdist(features, centres).argmin(1))
    method.e_step(features + 0.01, ("test",))
    assert torch.equal(method.centres, centres) and method.has_converged


def test_the_stop_is_strict():
    method = make_method(stop_below=2 / M)
    labels = torch.arange(M) % K
    for num_changed, converged in [(0, False), (2, False), (1, True), (5, False)]:
        labels[:num_changed] = (labels[:num_changed] + 1) % K
        method.renew_targets(nn.functional.one_hot(labels, K).float())
        if method.targets_made > 1:
            assert int(method.num_changed) == num_changed and bool(method.has_converged) == converged


def test_errors_say_what_to_start_from():
    method = make_method(reconstruction_weight=1.0)
    with pytest.raises(InputError, match="start and before are null"):
        method.on_train_start()
    with pytest.raises(InputError, match="no decoder to train on"):
        method.start_from(make_method())
    make_method().start_from(make_method(reconstruction_weight=1.0))
    with pytest.raises(InputError, match="extra images"):
        method.losses(make_batch(torch.randn(4, 5), torch.arange(4), extra=True))


# Whole runs on the digits


class WatchTargets(Callback):
    """Notes the images of each batch and the number of targets when a step ends; may interrupt at a step."""

    interrupt_at = NO_LIMIT

    def __init__(self):
        WatchTargets.batches, WatchTargets.targets_made = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not isinstance(pl_module, DEC):  # the stage before
            return
        WatchTargets.batches.append(batch.indices.tolist())
        WatchTargets.targets_made.append(int(pl_module.targets_made))
        if trainer.global_step == WatchTargets.interrupt_at:
            raise KeyboardInterrupt


def compose_run(*overrides, name="idec"):
    sizes = [f"{place}.backbone.hidden_sizes=[32]" for place in ("method", "before.method")]
    watch = "+callbacks.watch._target_=tests.methods.test_dec.WatchTargets"
    saves = ["callbacks.checkpoint.min_seconds=0", "callbacks.checkpoint.every_n_steps=1", "~callbacks.evaluation"]
    few = ["before.trainer.max_epochs=3", "report.map_points=0", "pixel_baseline_max_values=0"]
    return compose_train(f"method={name}", "hardware=cpu", *sizes, *few, watch, *saves, *overrides)


def read_state(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_targets_follow_the_steps_and_images_keep_their_order_over_epochs(tmp_path):
    run(compose_run("trainer.max_steps=11", "method.target_every_n_steps=4"), tmp_path)
    assert WatchTargets.targets_made == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]  # the second epoch begins at step 8
    assert [i for batch in WatchTargets.batches[:7] for i in batch] == list(range(1797))
    assert WatchTargets.batches[7:11] == WatchTargets.batches[:4]


@pytest.mark.parametrize("step", [4, 6])  # when a target is due, and between two
def test_a_resumed_run_meets_the_same_targets(step, tmp_path):
    overrides = ["trainer.max_steps=11", "method.target_every_n_steps=4"]
    run(compose_run(*overrides), tmp_path / "whole")
    overrides.append(f"start={tmp_path / 'whole' / 'before'}")
    WatchTargets.interrupt_at = step
    try:
        with pytest.raises(KeyboardInterrupt):
            run(compose_run(*overrides), tmp_path / "resumed")
    finally:
        WatchTargets.interrupt_at = NO_LIMIT
    run(compose_run(*overrides), tmp_path / "resumed")
    for name, value in read_state(tmp_path / "whole").items():
        assert torch.equal(read_state(tmp_path / "resumed")[name], value), name


def test_a_run_stops_by_itself_with_the_assignments_of_the_last_target(tmp_path):
    overrides = ["method.target_every_n_steps=3", "method.stop_below=1.0", "method.optimizer.lr=1e-6"]
    results = run(compose_run(*overrides), tmp_path)
    assert WatchTargets.targets_made == [1, 1, 1] and results["epochs"] == 1
    state = read_state(tmp_path)
    assert state["has_converged"] and int(state["targets_made"]) == 2
    lines = (tmp_path / "assignments.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[1]) for line in lines] == state["assignments"].tolist()
    (tmp_path / "results.json").unlink()  # as if it had been killed while the report was written
    assert run(compose_run(*overrides), tmp_path)["epochs"] == 1
    assert WatchTargets.batches == [], "no step after the stop"
    for name, value in read_state(tmp_path).items():
        assert torch.equal(value, state[name]), name


def test_a_loaded_run_assigns_new_images_to_the_nearest_centre(tmp_path):
    run(compose_run("trainer.max_steps=5", name="dec"), tmp_path)
    _, method = load_method(load_checkpoint(tmp_path))
    images = torch.rand(6, 1, 8, 8)
    features = method.encode(images)
    expected = torch.cdist(features, method.centres).argmin(1)
    assert torch.equal(method.cluster_logits(features).argmax(1), expected)
