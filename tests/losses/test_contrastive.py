"""InfoNCE in both forms against its equations, written as loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from deepclust.engine.distributed import all_gather_with_gradient
from deepclust.losses.contrastive import info_nce, nt_xent
from tests.processes import run_on_processes


def slow_info_nce(anchors, others, temperature):
    total = 0.0
    for i, anchor in enumerate(anchors):
        scores = [math.exp(float(anchor @ other) / temperature) for other in others]
        total -= math.log(scores[i] / sum(scores))
    return total / len(anchors)


def slow_nt_xent(a, b, temperature):
    rows, n, total = [*a, *b], len(a), 0.0
    for i, row in enumerate(rows):
        positive = math.exp(float(row @ rows[(i + n) % (2 * n)]) / temperature)
        total -= math.log(positive / sum(math.exp(float(row @ r) / temperature) for j, r in enumerate(rows) if j != i))
    return total / len(rows)


@pytest.mark.parametrize(("loss", "slow"), [(info_nce, slow_info_nce), (nt_xent, slow_nt_xent)])
@pytest.mark.parametrize("shape", [(2, 3), (7, 4), (5, 12)])
def test_losses_equal_their_equations(loss, slow, shape):
    a, b = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(shape[0]))
    assert float(loss(a, b, temperature=0.4)) == pytest.approx(slow(a, b, 0.4), rel=1e-10)


def test_nt_xent_ignores_the_order_of_views_and_images():
    a, b = torch.randn(2, 9, 4, dtype=torch.float64)
    loss, order = nt_xent(a, b, temperature=0.5), torch.randperm(9)
    torch.testing.assert_close(nt_xent(b, a, temperature=0.5), loss)
    torch.testing.assert_close(nt_xent(a[order], b[order], temperature=0.5), loss)


def test_info_nce_has_a_direction_and_gradients_in_both_views():
    a, b = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss = info_nce(a, b, temperature=0.5)
    assert not torch.isclose(loss, info_nce(b, a, temperature=0.5))
    loss.backward()
    assert a.grad.abs().sum() > 0 and b.grad.abs().sum() > 0


def test_equal_rows_give_the_loss_of_a_random_guess():
    rows = F.normalize(torch.ones(5, 3, dtype=torch.float64), dim=1)
    assert float(info_nce(rows, rows, temperature=0.1)) == pytest.approx(math.log(5))
    assert float(nt_xent(rows, rows, temperature=0.1)) == pytest.approx(math.log(9))  # its own row is left out


@pytest.mark.parametrize("loss", [info_nce, nt_xent])
def test_one_row_gives_zero_without_gradient(loss):
    a, b = torch.randn(1, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    value = loss(a, b, temperature=0.5)
    value.backward()
    assert value.item() == 0 and not a.grad.any() and not b.grad.any()


@pytest.mark.parametrize("loss", [info_nce, nt_xent])
def test_large_scores_do_not_overflow(loss):
    a = (1000 * torch.eye(4)).requires_grad_()
    value = loss(a, a.detach(), temperature=0.01)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(a.grad).all()


@pytest.mark.parametrize("loss", [info_nce, nt_xent])
def test_full_precision_under_autocast(loss):
    a, b = torch.randn(2, 16, 8)
    exact = loss(a, b, temperature=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(a, b, temperature=0.1), exact)
        assert loss(a.bfloat16(), b, temperature=0.1).dtype == torch.float32


def compute_loss_and_gradients(rank, a, b):
    a, b = (rows.chunk(2)[rank].clone().requires_grad_() for rows in (a, b))
    all_a, all_b = all_gather_with_gradient(a), all_gather_with_gradient(b)
    loss = nt_xent(all_a, all_b, temperature=0.5) + info_nce(all_a.T, all_b.T, temperature=0.5)
    loss.backward()
    return loss.detach(), a.grad / 2, b.grad / 2  # DDP takes the mean


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    a, b = (torch.randn(8, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    loss = nt_xent(a, b, temperature=0.5) + info_nce(a.T, b.T, temperature=0.5)
    loss.backward()
    results = run_on_processes(compute_loss_and_gradients, 2, tmp_path, a.detach(), b.detach())
    for rank, (value, grad_a, grad_b) in enumerate(results):
        torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grad_a, a.grad.chunk(2)[rank], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(grad_b, b.grad.chunk(2)[rank], rtol=1e-10, atol=1e-14)
