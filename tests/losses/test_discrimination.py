"""Mixed targets and cross-entropies against their equations."""

import math

import pytest
import torch
import torch.nn.functional as F

from deepclust.losses.discrimination import cross_entropy_per_row, mix_with_other_view


def test_targets_mix_the_pseudo_label_with_the_other_view():
    logits = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    pseudo_labels = F.one_hot(torch.tensor([0, 3, 1, 1, 2]), 4).double()
    targets = mix_with_other_view(pseudo_labels, logits, label_weight=0.2)
    assert not targets.requires_grad
    for view in (0, 1):
        for row in range(5):
            exponentials = [math.exp(x) for x in logits[1 - view, row].tolist()]
            for k in range(4):
                expected = 0.2 * float(pseudo_labels[row, k]) + 0.8 * exponentials[k] / sum(exponentials)
                assert float(targets[view, row, k]) == pytest.approx(expected, rel=1e-12)


def test_weight_one_gives_the_pseudo_label():
    pseudo_labels = F.one_hot(torch.tensor([0, 1]), 3).float()
    assert torch.equal(
        mix_with_other_view(pseudo_labels, torch.randn(2, 2, 3), label_weight=1.0), pseudo_labels.expand(2, 2, 3)
    )


def test_cross_entropy_per_row_equals_its_formula():
    logits, targets = torch.randn(3, 4, 5), torch.rand(3, 4, 5).softmax(2)
    expected = -(targets * logits.log_softmax(2)).sum(2)
    torch.testing.assert_close(cross_entropy_per_row(logits, targets), expected)
    assert cross_entropy_per_row(logits[:, :0], targets[:, :0]).shape == (3, 0)
