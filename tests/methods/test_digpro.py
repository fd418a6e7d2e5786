"""DigPro: the groups, the bank, the order of a step, and the gradients."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.errors import InputError
from deepclust.methods.digpro import DigPro, FeatureBank, MomentumGroups, group_loss, is_reset_step
from tests.processes import run_on_processes


def make_groups(vectors, decay=0.99):
    groups = MomentumGroups(num_groups=len(vectors), num_features=vectors.shape[1], decay=decay)
    groups.to(vectors.dtype).vectors.copy_(vectors)
    return groups


def make_method(global_step=0, epoch=0, **settings):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU())
    backbone.num_features = 7
    arguments = {
        "num_images": 40,
        "num_clusters": 3,
        "bank_size": 40,
        "noise_std": 0.05,
        "warmup_epochs": 1,
        "first_ema_decay": 0.99,
        "group_reset_every_n_steps": 3,
    }
    method = DigPro(
        backbone=backbone,
        embedding_size=4,
        hidden_size=8,
        temperature=0.5,
        scattering_weight=0.1,
        group_weight=0.3,
        group_temperature=0.1,
        group_decay=0.99,
        epochs=4,
        ema_decay=0.996,
        ema_decay_end=0.996,
        predictor_lr_factor=10,
        kmeans_restarts=2,
        kmeans_max_iterations=20,
        kmeans_tolerance=1e-4,
        e_step_every_n_epochs=1,
        optimizer=torch.optim.SGD,
        schedule=lambda step, steps_per_epoch: 1.0,
        **{**arguments, **settings},
    )
    method._trainer = SimpleNamespace(
        datamodule=SimpleNamespace(batches_per_epoch=5),
        accumulate_grad_batches=1,
        current_epoch=epoch,
        global_step=global_step,
    )
    return method


def make_batch(size=12, extra=False):
    views = tuple(torch.randn(2, size, 6, generator=torch.Generator().manual_seed(1)))
    indices = torch.arange(size) + (1000 if extra else 0)
    return TrainBatch(views, indices, Draws(key=(0, 0, 0), first_row=0, global_batch_size=size), extra)


# Groups


def test_groups_move_towards_the_raw_means_of_their_rows():
    groups = make_groups(torch.tensor([[2.0, 0], [0, 1.0], [-1.0, -1.0]]), decay=0.9)
    rows = torch.tensor([[4.0, 1.0], [2.0, 1.0], [0, 3.0]])
    assert groups.assign(rows).tolist() == [0, 0, 1]
    expected = [[0.9 * 2 + 0.1 * 3, 0.1 * 1], [0, 0.9 + 0.1 * 3], [-1.0, -1.0]]  # no row is assigned to the third
    torch.testing.assert_close(groups.compute_update(rows), torch.tensor(expected))
    assert torch.equal(groups.compute_update(rows)[2], groups.vectors[2]), (
        "a group without rows has to stay the same bit for bit"
    )


def test_gradients_through_groups_are_damped_by_the_decay_and_shared_by_the_members():
    groups = make_groups(torch.eye(2, dtype=torch.float64), decay=0.99)
    rows = torch.tensor([[3.0, 1.0], [2.0, 0.0], [1.0, 5.0]], dtype=torch.float64, requires_grad=True)
    probe = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    (groups.compute_update(rows) * probe).sum().backward()
    expected = 0.01 * torch.tensor([[0.5, 1.0], [0.5, 1.0], [3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(rows.grad, expected)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_the_first_of_equal_groups_wins_and_length_does_not_matter(size):
    generator = torch.Generator().manual_seed(size)
    vectors = torch.randn(6, 33, generator=generator)
    vectors[4] = vectors[1]
    rows = torch.randn(size, 33, generator=generator)
    assignments = make_groups(vectors).assign(rows)
    assert 4 not in assignments.tolist()
    assert torch.equal(make_groups(4 * vectors).assign(rows / 8), assignments)
    assert make_groups(vectors).assign(torch.zeros(2, 33)).tolist() == [0, 0]


def test_group_loss_is_a_cross_entropy_of_cosines():
    generator = torch.Generator().manual_seed(0)
    predictions, groups = torch.randn(5, 4, generator=generator), torch.randn(3, 4, generator=generator)
    assignments = torch.tensor([0, 2, 1, 1, 0])
    total = 0.0
    for row, group in zip(predictions, assignments.tolist(), strict=True):
        exponentials = [math.exp(float(F.cosine_similarity(row, g, dim=0)) / 0.1) for g in groups]
        total -= math.log(exponentials[group] / sum(exponentials))
    loss = group_loss(predictions, groups, assignments, temperature=0.1)
    assert float(loss) == pytest.approx(total / 5, rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(group_loss(predictions, groups, assignments, temperature=0.1), loss)


def test_group_loss_of_a_single_group_is_zero():
    predictions, groups, assignments = torch.randn(4, 3), torch.randn(1, 3), torch.zeros(4, dtype=torch.int64)
    assert float(group_loss(predictions, groups, assignments, temperature=0.1)) == 0


# The bank and the reset


def test_the_rest_of_a_batch_that_reaches_the_end_of_the_bank_is_dropped():
    bank = FeatureBank(size=5, num_features=1)
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(5))
    bank.rows.zero_()
    for rows, expected, position in (
        ([1, 2, 3], [1, 2, 3, 0, 0], 3),
        ([4, 5, 6], [1, 2, 3, 4, 5], 0),
        ([7, 8, 9, 10, 11], [7, 8, 9, 10, 11], 0),  # ends exactly at the end of the bank
        ([12, 13, 14, 15, 16, 17], [12, 13, 14, 15, 16], 0),
        ([18], [18, 13, 14, 15, 16], 1),
    ):
        bank.push(torch.tensor(rows, dtype=torch.float32).unsqueeze(1))
        assert bank.rows[:, 0].tolist() == expected and int(bank.position) == position


def test_groups_are_reset_every_n_steps_but_not_at_the_first():
    assert [step for step in range(1, 13) if is_reset_step(step, 4)] == [4, 8, 12]
    assert [step for step in range(1, 5) if is_reset_step(step, 1)] == [2, 3, 4]


def test_a_reset_takes_the_normalised_centroids_of_the_rows():
    generator = torch.Generator().manual_seed(0)
    centroids = F.normalize(torch.eye(3, 4) + 0.1, dim=1)
    rows = centroids.repeat(10, 1) + 0.01 * torch.randn(30, 4, generator=generator)
    groups = make_groups(torch.rand(3, 4, generator=generator))
    groups.reset_to_centroids(rows, (0,), num_restarts=3, max_iterations=50, tolerance=1e-4)
    nearest_groups = groups.vectors[torch.cdist(centroids, groups.vectors).argmin(1)]
    torch.testing.assert_close(nearest_groups, centroids, atol=0.02, rtol=0)
    torch.testing.assert_close(groups.vectors.norm(dim=1), torch.ones(3))


def test_a_bank_with_fewer_rows_than_groups_raises_an_error():
    with pytest.raises(InputError, match="bank_size"):
        make_method(bank_size=2)


# One step


def test_target_moves_twice_a_step_and_once_when_the_groups_are_reset():
    for step, decay in ((0, 0.99 * 0.996), (1, 0.99 * 0.996), (2, 0.996), (5, 0.996)):  # steps 3 and 6 are resets
        method = make_method(global_step=step)
        with torch.no_grad():
            for p in method.projector.parameters():
                p.add_(1.0)
        before = method.target.projector[0].weight.clone()
        method.reset_groups_or_update_target((0,))
        method.update_target()
        expected = decay * before + (1 - decay) * method.projector[0].weight
        torch.testing.assert_close(method.target.projector[0].weight, expected)


def test_target_and_groups_stay_while_gradients_are_accumulated():
    method = make_method(global_step=2)
    method.is_optimizer_step = False
    target_before = [p.clone() for p in method.target.parameters()]
    groups_before = method.groups.vectors.clone()
    method.reset_groups_or_update_target((0,))
    method.update_target()
    assert all(torch.equal(p, b) for p, b in zip(method.target.parameters(), target_before, strict=True))
    assert torch.equal(method.groups.vectors, groups_before)


def test_predictor_sees_each_view_without_and_then_with_noise():
    method = make_method(epoch=1)
    predictor_inputs = []
    method.predictor.register_forward_hook(lambda module, args, output: predictor_inputs.append(args[0]))
    method.losses(make_batch())
    assert len(predictor_inputs) == 4
    a, a_with_noise, b, b_with_noise = predictor_inputs
    assert not torch.equal(a, a_with_noise) and not torch.equal(b, b_with_noise)
    assert float((a_with_noise - a).detach().std()) == pytest.approx(0.05, rel=0.5)
    assert int(method.predictor[1].num_batches_tracked) == 4


def test_warm_up_has_the_group_loss_but_neither_noise_nor_scattering():
    method = make_method(epoch=0)
    predictor_inputs = []
    method.predictor.register_forward_hook(lambda module, args, output: predictor_inputs.append(args[0]))
    terms = method.losses(make_batch())
    assert float(terms["scattering"]) == 0 and float(terms["group"]) > 0
    assert torch.equal(predictor_inputs[0], predictor_inputs[1]) and torch.equal(
        predictor_inputs[2], predictor_inputs[3]
    )
    assert float(make_method(epoch=1).losses(make_batch())["scattering"]) > 0


def test_second_direction_starts_from_the_groups_of_the_first():
    method, reference = make_method(), make_method()
    batch = make_batch()
    method.losses(batch)
    reference.reset_groups_or_update_target((0,))
    q_a, q_b = reference.online(batch.views[0]), reference.online(batch.views[1])
    reference.groups.vectors.copy_(reference.groups.compute_update(q_a).detach())
    torch.testing.assert_close(method.groups.vectors, reference.groups.compute_update(q_b).detach())
    expected_rows = F.normalize(torch.cat([q_a, q_b]), dim=1)
    torch.testing.assert_close(method.bank.rows[:24], expected_rows.detach())


def test_target_projections_are_assigned_to_the_groups_before_the_update():
    method = make_method(group_reset_every_n_steps=100)
    method.predictor = nn.Identity()
    q, k = torch.randn(2, 10, 4)
    groups_before = make_groups(method.groups.vectors.clone())
    _, _, group = method.compute_terms_and_update_groups(q, k, torch.zeros_like(q), torch.arange(10))
    expected = group_loss(q, groups_before.compute_update(q), groups_before.assign(k), temperature=0.1)
    torch.testing.assert_close(group, expected)


def test_extra_images_need_no_pseudo_label():
    terms = make_method(epoch=1).losses(make_batch(extra=True))
    assert float(terms["scattering"]) == 0 and float(terms["group"]) > 0


def test_state_is_in_the_checkpoint_but_not_in_the_optimiser():
    method = make_method()
    for name in (
        "groups.vectors",
        "bank.rows",
        "bank.position",
        "pseudo_labels.assignments",
        "pseudo_labels.centroids",
    ):
        assert name in method.state_dict()
    networks, predictor = method.parameter_groups()
    assert predictor["lr_factor"] == 10 and len(predictor["params"]) == len(list(method.predictor.parameters()))
    assert {id(p) for g in (networks, predictor) for p in g["params"]} == {
        id(p) for p in method.parameters() if p.requires_grad
    }


def _run_one_direction(rank, q, k, num_processes):
    method = make_method().double()
    method.predictor = nn.Identity()  # batch statistics would differ between processes
    method.pseudo_labels.assignments.copy_(torch.arange(40) % 3)
    size = len(q) // num_processes
    rows = slice(rank * size, rank * size + size)
    own_q = q[rows].clone().requires_grad_()
    draws = Draws(key=(0,), first_row=rows.start, global_batch_size=len(q))
    noise = 0.1 * draws.normal_like(own_q, "noise of a")
    terms = method.compute_terms_and_update_groups(own_q, k[rows], noise, torch.arange(len(q))[rows])
    sum(terms).backward()
    return torch.stack(terms).detach(), own_q.grad / num_processes, method.groups.vectors


@pytest.mark.slow
def test_two_processes_give_the_result_of_one_on_the_joined_batch(tmp_path):
    q, k = torch.randn(2, 12, 4, dtype=torch.float64)
    terms, gradient, groups = _run_one_direction(0, q, k, 1)
    results = run_on_processes(_run_one_direction, 2, tmp_path, q, k, 2)
    torch.testing.assert_close((results[0][0] + results[1][0]) / 2, terms, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.cat([results[0][1], results[1][1]]), gradient, rtol=1e-9, atol=1e-12)
    for _, _, vectors in results:
        torch.testing.assert_close(vectors, groups, rtol=1e-12, atol=0)
