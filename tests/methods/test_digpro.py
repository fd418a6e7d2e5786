"""DigPro: groups that follow their rows, the bank, the order of a step, and what reaches what."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.errors import InputError
from deepclust.methods.digpro import DigPro, FeatureBank, MomentumGroups, group_loss, resets_at
from tests.engine.test_distributed import on_processes


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
    return TrainBatch(views, indices, Draws(key=(0, 0, 0), first=0, total=size), extra)


# Groups


def test_groups_move_towards_the_raw_means_of_their_rows():
    groups = make_groups(torch.tensor([[2.0, 0], [0, 1.0], [-1.0, -1.0]]), decay=0.9)
    rows = torch.tensor([[4.0, 1.0], [2.0, 1.0], [0, 3.0]])
    assert groups.assign(rows).tolist() == [0, 0, 1]
    expected = [[0.9 * 2 + 0.1 * 3, 0.1 * 1], [0, 0.9 + 0.1 * 3], [-1.0, -1.0]]  # nobody falls to the third
    torch.testing.assert_close(groups.moved(rows), torch.tensor(expected))
    assert torch.equal(groups.moved(rows)[2], groups.vectors[2]), "untouched to the last bit"


def test_gradients_through_groups_are_damped_by_the_decay_and_shared_by_the_members():
    groups = make_groups(torch.eye(2, dtype=torch.float64), decay=0.99)
    rows = torch.tensor([[3.0, 1.0], [2.0, 0.0], [1.0, 5.0]], dtype=torch.float64, requires_grad=True)
    probe = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    (groups.moved(rows) * probe).sum().backward()
    expected = 0.01 * torch.tensor([[0.5, 1.0], [0.5, 1.0], [3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(rows.grad, expected)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_the_first_of_equal_groups_wins_and_length_does_not_matter(size):
    drawn = torch.Generator().manual_seed(size)
    vectors = torch.randn(6, 33, generator=drawn)
    vectors[4] = vectors[1]
    rows = torch.randn(size, 33, generator=drawn)
    assigned = make_groups(vectors).assign(rows)
    assert 4 not in assigned.tolist()
    assert torch.equal(make_groups(4 * vectors).assign(rows / 8), assigned)
    assert make_groups(vectors).assign(torch.zeros(2, 33)).tolist() == [0, 0]


def test_group_loss_is_a_cross_entropy_of_cosines():
    drawn = torch.Generator().manual_seed(0)
    predictions, groups = torch.randn(5, 4, generator=drawn), torch.randn(3, 4, generator=drawn)
    assignments = torch.tensor([0, 2, 1, 1, 0])
    total = 0.0
    for row, own in zip(predictions, assignments.tolist(), strict=True):
        scores = [math.exp(float(F.cosine_similarity(row, g, dim=0)) / 0.1) for g in groups]
        total -= math.log(scores[own] / sum(scores))
    got = group_loss(predictions, groups, assignments, temperature=0.1)
    assert float(got) == pytest.approx(total / 5, rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(group_loss(predictions, groups, assignments, temperature=0.1), got)


def test_one_group_has_nothing_to_tell_apart():
    assert (
        float(group_loss(torch.randn(4, 3), torch.randn(1, 3), torch.zeros(4, dtype=torch.int64), temperature=0.1)) == 0
    )


# The bank and the reset


def test_a_batch_that_reaches_the_end_of_the_bank_loses_its_rest():
    bank = FeatureBank(size=5, num_features=1)
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(5))
    bank.rows.zero_()
    for rows, expected, position in (
        ([1, 2, 3], [1, 2, 3, 0, 0], 3),
        ([4, 5, 6], [1, 2, 3, 4, 5], 0),
        ([7, 8, 9, 10, 11], [7, 8, 9, 10, 11], 0),  # reaches the end, loses nothing
        ([12, 13, 14, 15, 16, 17], [12, 13, 14, 15, 16], 0),
        ([18], [18, 13, 14, 15, 16], 1),
    ):
        bank.push(torch.tensor(rows, dtype=torch.float32).unsqueeze(1))
        assert bank.rows[:, 0].tolist() == expected and int(bank.position) == position


def test_groups_start_anew_every_so_many_steps_but_not_at_the_first():
    assert [step for step in range(1, 13) if resets_at(step, 4)] == [4, 8, 12]
    assert [step for step in range(1, 5) if resets_at(step, 1)] == [2, 3, 4]


def test_reset_takes_unit_centroids_of_the_bank():
    drawn = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.eye(3, 4) + 0.1, dim=1)
    rows = centres.repeat(10, 1) + 0.01 * torch.randn(30, 4, generator=drawn)
    groups = make_groups(torch.rand(3, 4, generator=drawn))
    groups.reset(rows, (0,), num_restarts=3, max_iterations=50, tolerance=1e-4)
    found = groups.vectors[torch.cdist(centres, groups.vectors).argmin(1)]
    torch.testing.assert_close(found, centres, atol=0.02, rtol=0)
    torch.testing.assert_close(groups.vectors.norm(dim=1), torch.ones(3))


def test_a_bank_smaller_than_the_groups_is_refused():
    with pytest.raises(InputError, match="bank_size"):
        make_method(bank_size=2)


# One step


def test_target_moves_twice_a_step_and_once_where_groups_start_anew():
    for step, decay in ((0, 0.99 * 0.996), (1, 0.99 * 0.996), (2, 0.996), (5, 0.996)):  # steps 3 and 6 are resets
        method = make_method(global_step=step)
        with torch.no_grad():
            for p in method.projector.parameters():
                p.add_(1.0)
        before = method.target.projector[0].weight.clone()
        method.begin_step((0,))
        method.end_step()
        expected = decay * before + (1 - decay) * method.projector[0].weight
        torch.testing.assert_close(method.target.projector[0].weight, expected)


def test_nothing_moves_twice_while_gradients_add_up():
    method = make_method(global_step=2)
    method.steps_now = False
    before = [p.clone() for p in method.target.parameters()], method.groups.vectors.clone()
    method.begin_step((0,))
    method.end_step()
    assert all(torch.equal(p, b) for p, b in zip(method.target.parameters(), before[0], strict=True))
    assert torch.equal(method.groups.vectors, before[1])


def test_predictor_sees_each_view_plain_and_then_with_noise():
    method = make_method(epoch=1)
    seen = []
    method.predictor.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    method.losses(make_batch())
    assert len(seen) == 4
    a, noisy_a, b, noisy_b = seen
    assert not torch.equal(a, noisy_a) and not torch.equal(b, noisy_b)
    assert float((noisy_a - a).detach().std()) == pytest.approx(0.05, rel=0.5)
    assert int(method.predictor[1].num_batches_tracked) == 4


def test_groups_are_on_in_warm_up_and_noise_and_scattering_are_not():
    method = make_method(epoch=0)
    seen = []
    method.predictor.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    terms = method.losses(make_batch())
    assert float(terms["scattering"]) == 0 and float(terms["group"]) > 0
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert float(make_method(epoch=1).losses(make_batch())["scattering"]) > 0


def test_second_direction_starts_from_the_groups_of_the_first():
    method, apart = make_method(), make_method()
    batch = make_batch()
    method.losses(batch)
    apart.begin_step((0,))
    q_a, q_b = apart.online(batch.views[0]), apart.online(batch.views[1])
    apart.groups.vectors.copy_(apart.groups.moved(q_a).detach())
    torch.testing.assert_close(method.groups.vectors, apart.groups.moved(q_b).detach())
    pushed = F.normalize(torch.cat([q_a, q_b]), dim=1)
    torch.testing.assert_close(method.bank.rows[:24], pushed.detach())


def test_targets_of_the_group_loss_are_of_the_old_groups():
    method = make_method(group_reset_every_n_steps=100)
    method.predictor = nn.Identity()
    q, k = torch.randn(2, 10, 4)
    old = make_groups(method.groups.vectors.clone())
    _, _, group = method.direction(q, k, torch.zeros_like(q), torch.arange(10))
    expected = group_loss(q, old.moved(q), old.assign(k), temperature=0.1)
    torch.testing.assert_close(group, expected)


def test_extra_images_need_no_pseudo_label():
    terms = make_method(epoch=1).losses(make_batch(extra=True))
    assert float(terms["scattering"]) == 0 and float(terms["group"]) > 0


def test_state_is_in_the_checkpoint_and_out_of_the_optimiser():
    method = make_method()
    for name in (
        "groups.vectors",
        "bank.rows",
        "bank.position",
        "pseudo_labels.assignments",
        "pseudo_labels.centroids",
    ):
        assert name in method.state_dict()
    slow, fast = method.parameter_groups()
    assert fast["lr_factor"] == 10 and len(fast["params"]) == len(list(method.predictor.parameters()))
    assert {id(p) for g in (slow, fast) for p in g["params"]} == {id(p) for p in method.parameters() if p.requires_grad}


def _one_direction(rank, q, k, processes):
    method = make_method().double()
    method.predictor = nn.Identity()  # batch statistics would differ by process
    method.pseudo_labels.assignments.copy_(torch.arange(40) % 3)
    size = len(q) // processes
    rows = slice(rank * size, rank * size + size)
    mine = q[rows].clone().requires_grad_()
    noise = 0.1 * Draws(key=(0,), first=rows.start, total=len(q)).normal_like(mine, "noise of a")
    terms = method.direction(mine, k[rows], noise, torch.arange(len(q))[rows])
    sum(terms).backward()
    return torch.stack(terms).detach(), mine.grad / processes, method.groups.vectors


@pytest.mark.slow
def test_two_processes_are_one_on_the_joined_batch(tmp_path):
    q, k = torch.randn(2, 12, 4, dtype=torch.float64)
    terms, gradient, groups = _one_direction(0, q, k, 1)
    got = on_processes(_one_direction, 2, tmp_path, q, k, 2)
    torch.testing.assert_close((got[0][0] + got[1][0]) / 2, terms, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.cat([got[0][1], got[1][1]]), gradient, rtol=1e-9, atol=1e-12)
    for _, _, vectors in got:
        torch.testing.assert_close(vectors, groups, rtol=1e-12, atol=0)
