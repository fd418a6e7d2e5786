"""Targets and cross-entropies of remembered clusters against their equations."""

import math

import pytest
import torch
import torch.nn.functional as F

from deepclust.losses.discrimination import cross_entropies, mixed_targets


def test_targets_mix_the_label_with_the_other_view():
    logits = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    labels = F.one_hot(torch.tensor([0, 3, 1, 1, 2]), 4).double()
    targets = mixed_targets(labels, logits, label_weight=0.2)
    assert not targets.requires_grad
    for view in (0, 1):
        for row in range(5):
            exponentials = [math.exp(x) for x in logits[1 - view, row].tolist()]
            for k in range(4):
                expected = 0.2 * float(labels[row, k]) + 0.8 * exponentials[k] / sum(exponentials)
                assert float(targets[view, row, k]) == pytest.approx(expected, rel=1e-12)


def test_weight_one_is_the_label():
    labels = F.one_hot(torch.tensor([0, 1]), 3).float()
    assert torch.equal(mixed_targets(labels, torch.randn(2, 2, 3), label_weight=1.0), labels.expand(2, 2, 3))


def test_cross_entropies_row_by_row():
    logits, targets = torch.randn(3, 4, 5), torch.rand(3, 4, 5).softmax(2)
    expected = -(targets * logits.log_softmax(2)).sum(2)
    torch.testing.assert_close(cross_entropies(logits, targets), expected)
    assert cross_entropies(logits[:, :0], targets[:, :0]).shape == (3, 0)
