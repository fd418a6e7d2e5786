"""Batch normalisation in groups: one process computes what several do without synchronisation; and synchronised."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.commands.train import run
from deepclust.config.build import build
from deepclust.engine import distributed
from deepclust.engine.batch_norm import GroupedBatchNorm, check_groups, group_batch_norm, synchronise_batch_norm
from deepclust.engine.cuda_graphs import ReplayedFunction
from deepclust.errors import InputError
from tests.conftest import compose_train
from tests.engine.test_launch import SHORT_RUN
from tests.processes import TWO_PROCESSES, run_deepclust, run_on_processes

FOUR_PROCESSES = [*TWO_PROCESSES[:-1], "hardware.devices=4"]


def make_network():
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5))
    for norm in (network[1], network[4]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return network.double()


@pytest.mark.parametrize("num_views", [1, 2, 3])
@pytest.mark.parametrize(("num_images", "num_groups"), [(8, 2), (12, 4), (11, 3)])
def test_every_group_is_normalised_as_by_a_network_of_its_own(num_views, num_images, num_groups):
    views = torch.randn(num_views, num_images, 3, 8, 8, dtype=torch.float64)
    edges = [num_images * g // num_groups for g in range(num_groups + 1)]
    network = make_network()
    groups = group_batch_norm(network, num_groups)
    groups.set_batch(num_images, 0, num_images)
    rows = network(views.flatten(0, 1)).unflatten(0, (num_views, num_images))
    rows.square().mean().backward()
    expected_gradients = [torch.zeros_like(p) for p in network.parameters()]
    for number in range(num_groups):
        alone, own = make_network(), slice(edges[number], edges[number + 1])
        expected = alone(views[:, own].flatten(0, 1))
        torch.testing.assert_close(rows[:, own].flatten(0, 1), expected, rtol=1e-12, atol=1e-12)
        (expected.square().sum() / rows.numel()).backward()
        for total, p in zip(expected_gradients, alone.parameters(), strict=True):
            total += p.grad
        if number == 0:
            first = dict(alone.named_buffers())
    for p, expected in zip(network.parameters(), expected_gradients, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12)
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, first[name], rtol=1e-12, atol=1e-12)


def test_layers_keep_their_weights_and_evaluate_as_before():
    network, images = make_network(), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    expected, state = network.eval()(images), {n: t.clone() for n, t in network.state_dict().items()}
    group_batch_norm(network, 3)
    assert torch.equal(network(images), expected)
    assert {n: t.tolist() for n, t in network.state_dict().items()} == {n: t.tolist() for n, t in state.items()}


def test_a_recording_belongs_to_one_way_of_grouping():
    network = make_network()
    groups = group_batch_norm(network, 2)
    replayed, images = ReplayedFunction(network.forward, network), torch.randn(8, 3, 8, 8)
    signatures = set()
    for num_images in (8, 4):  # one view of 8 images, and two of 4
        groups.set_batch(num_images, 0, num_images)
        replayed._follow_network_tensors()
        signatures.add(replayed._compute_signature((images,)))
    assert len(signatures) == 2


def _gather_two_views(rank, views, edges):
    own = views[:, edges[rank] : edges[rank + 1]]
    return distributed.all_gather_views(own.flatten(0, 1), 2)


def test_views_are_gathered_one_after_the_other(tmp_path):
    views = torch.arange(14.0).reshape(2, 7, 1)
    for gathered in run_on_processes(_gather_two_views, 2, tmp_path, views, (0, 3, 7)):
        assert torch.equal(gathered, views.flatten(0, 1))
    assert torch.equal(distributed.all_gather_views(views.flatten(0, 1), 2), views.flatten(0, 1))


def _compute_propos_step(rank, order, views, edges, num_groups):
    cfg = compose_train("method=propos", "dataset=digits", f"method.step_order={order}", "method.shuffle_target=true")
    cfg.merge_with({"method": {"hidden_size": 16, "embedding_size": 8, "warmup_epochs": 0}})
    cfg.merge_with({"dataset": {"num_images": 64, "num_clusters": 4}})
    torch.manual_seed(0)
    method = build(cfg.method).double()
    method.pseudo_labels.assignments.copy_(torch.arange(64) % 4)
    method._trainer = SimpleNamespace(
        datamodule=SimpleNamespace(batches_per_epoch=1), accumulate_grad_batches=1, current_epoch=1, global_step=0
    )
    own, size = slice(edges[rank], edges[rank + 1]), edges[-1]
    if num_groups > 1:
        group_batch_norm(method, num_groups).set_batch(own.stop - own.start, own.start, size)
    batch = TrainBatch(tuple(views[:, own]), torch.arange(size)[own], Draws((0,), own.start, size))
    loss = torch.stack(list(method.losses(batch).values())).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    if distributed.world_size() > 1:  # what DDP does
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= distributed.world_size()
    return gradients, dict(method.named_buffers())


# Each of two processes is one group, whether the option says so (2) or not (1); with 4 it has two.
@pytest.mark.parametrize(("order", "num_groups", "option"), [("two_pass", 2, 1), ("joint", 2, 2), ("joint", 4, 4)])
@pytest.mark.slow
def test_a_step_in_groups_is_that_of_processes_without_synchronisation(tmp_path, order, num_groups, option):
    """Gradients of all weights, and the running statistics of the first process, with the target in random order."""
    views = torch.rand(2, 11, 1, 8, 8, dtype=torch.float64)
    expected_gradients, expected_buffers = _compute_propos_step(0, order, views, (0, 11), num_groups)
    results = run_on_processes(_compute_propos_step, 2, tmp_path, order, views, (0, 5, 11), option)
    for name, expected in expected_gradients.items():
        for gradients, _ in results:
            torch.testing.assert_close(gradients[name], expected, rtol=1e-9, atol=1e-12)
    for name, expected in expected_buffers.items():
        torch.testing.assert_close(results[0][1][name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "processes"), [("two_pass", TWO_PROCESSES), ("joint", TWO_PROCESSES), ("joint", FOUR_PROCESSES)]
)
def test_processes_without_synchronisation_learn_what_groups_learn(tmp_path, order, processes):
    """ProPos in float64, with the target's images in random order: weights, running statistics, E-step and scores."""
    exact = [*SHORT_RUN, "hardware.precision=64-true", f"method.step_order={order}", "method.shuffle_target=true"]
    groups = ["batch_norm_groups=4"]
    run_deepclust("train", *exact, *groups, "hardware=cpu", f"hydra.run.dir={tmp_path / 'one'}")
    run_deepclust("train", *exact, *groups, *processes, f"hydra.run.dir={tmp_path / 'several'}")
    names = ["one", "several"]
    if processes is FOUR_PROCESSES:  # each process has one group anyway
        run_deepclust("train", *exact, *processes, f"hydra.run.dir={tmp_path / 'plain'}")
        names.append("plain")
    states = [torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for n in names]
    for state in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    scores = [json.loads((tmp_path / n / "results.json").read_text())["scores"] for n in names]
    assert all(score == scores[0] for score in scores)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "order"), [("byol", "joint"), ("digpro", None)])
def test_two_processes_of_other_methods_learn_what_two_groups_learn(tmp_path, method, order):
    """BYOL in its published order, and DigPro with its groups and bank, in float64: all weights and statistics."""
    exact = [*SHORT_RUN, f"method={method}", "hardware.precision=64-true"]
    exact += [f"method.step_order={order}", "method.shuffle_target=true"] if order else []
    run_deepclust("train", *exact, "batch_norm_groups=2", "hardware=cpu", f"hydra.run.dir={tmp_path / 'groups'}")
    run_deepclust("train", *exact, *TWO_PROCESSES, f"hydra.run.dir={tmp_path / 'processes'}")
    groups, processes = (
        torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for n in ("groups", "processes")
    )
    for name, value in groups.items():
        torch.testing.assert_close(processes[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_groups_are_those_of_each_batch_of_a_run(tmp_path, monkeypatch):
    seen = []
    forward = GroupedBatchNorm.forward

    def forward_and_note(layer, values):
        if layer.training:
            seen.append((len(values), layer.groups.num_images, layer.groups.edges()))
        return forward(layer, values)

    monkeypatch.setattr(GroupedBatchNorm, "forward", forward_and_note)
    settings = [
        "batch_norm_groups=4",
        "batch_size=512",
        "drop_last=false",
        "trainer.max_epochs=1",
        "report.map_points=0",
    ]
    run(compose_train("method=gcc", "hardware=cpu", *settings), tmp_path)
    assert {(n, edges[-1]) for _, n, edges in seen} == {(512, 512), (261, 261)}
    assert {tuple(edges) for *_, edges in seen} == {(0, 128, 256, 384, 512), (0, 65, 130, 195, 261)}
    assert {rows // n for rows, n, _ in seen} == {2}, "both views share statistics in GCC"


def test_one_group_leaves_the_network_as_it_is(train_small):
    _, folder = train_small("trainer.max_epochs=1")
    _, grouped = train_small("trainer.max_epochs=1", "batch_norm_groups=1", name="grouped")
    states = [torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (folder, grouped)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch_norm_groups=4", "sync_batchnorm=true"], "sync_batchnorm"),
        (["batch_norm_groups=100", "batch_size=128"], "batch_norm_groups=64"),
        (["batch_norm_groups=32", "batch_size=160", "drop_last=false"], "holds 37.*batch_norm_groups=18"),
    ],
)
def test_groups_that_do_not_fit_are_refused(train_small, overrides, message):
    with pytest.raises(InputError, match=message):
        train_small(*overrides)


def test_groups_that_do_not_divide_among_the_processes_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    check_groups(4, sync_batchnorm=False)
    with pytest.raises(InputError, match="batch_norm_groups is 3 on 2 processes"):
        check_groups(3, sync_batchnorm=False)


FOUR_DEVICES = ["propos_cifar10", "propos_cifar10_r34", "propos_cifar20", "propos_cifar20_r34", "propos_imagenet_dogs"]


@pytest.mark.parametrize("name", [*FOUR_DEVICES, "propos_imagenet10", "propos_stl10", "byol_cifar10"])
def test_published_experiments_of_four_devices_have_their_statistics(name):
    cfg = compose_train(f"experiment={name}")
    assert cfg.batch_norm_groups == 4 and cfg.method.shuffle_target and not cfg.sync_batchnorm
    assert cfg.batch_size == (512 if name in ("propos_cifar10", "byol_cifar10") else 256)


@pytest.mark.parametrize("name", ["propos_cifar10_paper", "propos_tiny_imagenet", "propos_imagenet"])
def test_published_experiments_of_one_device_or_with_synchronisation_have_one_group(name):
    cfg = compose_train(f"experiment={name}")
    assert cfg.batch_norm_groups == 1 and not cfg.method.shuffle_target


def test_a_target_in_random_order_gives_every_image_its_own_projection():
    cfg = compose_train("method=propos", "dataset=digits", "method.hidden_size=16", "method.shuffle_target=true")
    cfg.dataset.num_images, cfg.dataset.num_clusters = 64, 10
    method = build(cfg.method).double().eval()
    a, b = torch.rand(2, 6, 1, 8, 8, dtype=torch.float64)
    draws, project = Draws((0,), 0, 6), partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    project(method.project_target(a, draws, "a"), method.target(a))
    both = torch.cat([b, a])
    project(method.project_target(both, draws, "b and a"), method.target(both))


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5)])
def test_synchronised_batch_norm_on_one_process_equals_torchs(shape):
    torch_norm = nn.Sequential(nn.BatchNorm1d(4))
    synchronised_norm = synchronise_batch_norm(nn.Sequential(nn.BatchNorm1d(4)))
    values = torch.randn(shape)
    assert torch.equal(synchronised_norm(values), torch_norm(values))
    assert torch.equal(synchronised_norm[0].running_var, torch_norm[0].running_var)
