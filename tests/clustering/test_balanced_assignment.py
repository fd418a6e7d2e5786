"""Balance rules against slow versions written from their equations."""

import math

import pytest
import torch

from deepclust.clustering.balanced_assignment import EntropyBalance, SizeBalance, joining, sizes


def size_balance(clusters, *, step=0.5, min_share=0.9):
    return SizeBalance(num_clusters=clusters, step=step, min_share=min_share)


def entropy_balance(counts, weight):
    balance = EntropyBalance(num_clusters=len(counts), weight=weight).double()
    balance.counts.copy_(torch.tensor(counts, dtype=torch.float64))
    return balance


@pytest.mark.parametrize("min_share", [0.4, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_duals_follow_their_equation(rows, min_share):
    clusters, drawn = 6, torch.Generator().manual_seed(rows)
    balance, expected = size_balance(clusters, min_share=min_share), [0.0] * clusters
    for _ in range(10):
        labels = torch.randint(clusters, (rows,), generator=drawn)
        balance.update(labels, None)
        for k in range(clusters):
            expected[k] += 0.5 * (min_share / clusters - labels.tolist().count(k) / rows)
            expected[k] = max(expected[k], 0.0) if min_share < 1 else expected[k]
    assert balance.duals.tolist() == pytest.approx(expected, abs=1e-5)
    assert float(balance.counts.sum()) == 10 * rows


def test_size_rule_by_hand():
    balance = size_balance(2, step=1.0, min_share=0.8)
    similarity = torch.tensor([[0.9, 0.6], [0.8, 0.7], [0.5, 0.4], [0.9, 0.0]])
    assert balance.assign(similarity, None).tolist() == [0, 0, 0, 0]
    balance.update(torch.zeros(4, dtype=torch.int64), None)
    assert balance.duals.tolist() == pytest.approx([0.0, 0.4])  # 0.4 - 1 is cut off at 0
    assert balance.assign(similarity, None).tolist() == [1, 1, 1, 0]


def test_size_rule_keeps_every_cluster_near_its_bound():
    """Where one cluster is nearest to all rows, the others still come to their shares."""
    clusters, drawn = 5, torch.Generator().manual_seed(0)
    balance, rows = size_balance(clusters, step=0.1), []
    for _ in range(400):
        similarity = 0.1 * torch.randn(64, clusters, generator=drawn)
        similarity[:, 0] += 1.0
        rows.append(balance.assign(similarity, None))
        balance.update(rows[-1], None)
    shares = torch.bincount(torch.cat(rows[200:]), minlength=clusters) / (200 * 64)
    assert shares.min() > 0.95 * 0.9 / clusters


def test_duals_are_the_authors_to_the_last_bit():
    """First each member takes from its cluster, then all clusters gain: unclipped duals sum up rounding errors."""
    drawn = torch.Generator().manual_seed(0)
    balance, duals = SizeBalance(num_clusters=7, step=20.0, min_share=1.0), torch.zeros(7)
    for labels in torch.randint(7, (200, 12), generator=drawn):
        balance.update(labels, None)
        duals = duals - 20 / 12 * torch.bincount(labels, minlength=7) + 20 * (1 / 7)
    assert torch.equal(balance.duals, duals)


def test_an_epochs_end_forgets_counts_and_keeps_duals():
    balance = size_balance(3)
    balance.update(torch.tensor([0, 0, 1]), None)
    duals = balance.duals.clone()
    balance.end_epoch()
    assert torch.equal(balance.duals, duals) and not balance.counts.any()
    lasting = entropy_balance([3, 1], 1.0)
    lasting.end_epoch()
    assert lasting.counts.tolist() == [3, 1]


def plogp(p):
    return p * math.log(p) if p > 0 else 0.0


def disorder(counts, total):
    return sum(plogp(n / total) for n in counts)


@pytest.mark.parametrize("counts", [[5, 1, 0, 12], [1, 0], [7], [1, 1, 1]])
def test_entropy_rule_weighs_the_whole_distribution(counts):
    """Each row against sum p log p of the counts in which it alone has moved."""
    weight, drawn = 3.0 * sum(counts), torch.Generator().manual_seed(1)
    balance, total = entropy_balance(counts, weight), sum(counts)
    similarity = torch.randn(40, len(counts), generator=drawn, dtype=torch.float64)
    held = torch.tensor([k for k, n in enumerate(counts) if n])
    previous = held[torch.randint(len(held), (40,), generator=drawn)]
    expected = []
    for row, old in zip(similarity.tolist(), previous.tolist(), strict=True):
        costs = []
        for k in range(len(counts)):
            moved = list(counts)
            moved[old] -= 1
            moved[k] += 1
            costs.append(-row[k] + weight * (disorder(moved, total) - disorder(counts, total)))
        expected.append(costs.index(min(costs)))
    assert balance.assign(similarity, previous).tolist() == expected
    joined = []
    for row in similarity.tolist():
        costs = [
            -row[k] + weight * (plogp((n + 1) / (total + 1)) - plogp(n / (total + 1))) for k, n in enumerate(counts)
        ]
        joined.append(costs.index(min(costs)))
    assert balance.assign(similarity, None).tolist() == joined


def test_entropy_rule_without_counts_takes_the_nearest():
    similarity = torch.randn(10, 4, dtype=torch.float64)
    assert torch.equal(entropy_balance([0, 0, 0, 0], 50.0).assign(similarity, None), similarity.argmax(1))


def test_entropy_counts_hold_each_image_once():
    balance = entropy_balance([0, 0, 0], 1.0)
    balance.update(torch.tensor([0, 0, 1]), None)
    balance.update(torch.tensor([2, 0]), torch.tensor([0, 1]))
    assert balance.counts.tolist() == [2, 0, 1]
    balance.update(torch.tensor([1, 1]), torch.tensor([-1, 2]))  # the first was in none
    assert balance.counts.tolist() == [2, 2, 0]


def test_rows_in_no_or_an_empty_cluster_are_defined():
    balance = entropy_balance([4, 0, 2], 5.0)
    # To join the empty cluster is a gain for the first; the second is taken to be in it already, and may stay.
    assert balance.assign(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([-1, 1])).tolist() == [1, 1]
    assert all(math.isfinite(c) for c in joining(balance.counts, balance.counts.sum()).tolist())


def test_joining_is_exact_where_the_difference_cancels():
    counts = torch.tensor([0.0, 1.0, 12_811.0, 1_281_167.0])
    got = joining(counts, torch.tensor(1_281_168.0)).double()
    total = 1_281_168
    for n, value in zip(counts.double().tolist(), got.tolist(), strict=True):
        p, one = n / total, 1 / total
        exact = (math.log(p + one) + n * math.log1p(1 / n)) / total if n else one * math.log(one)
        assert value == pytest.approx(exact, rel=1e-5)


def test_sizes_count_like_bincount():
    labels = torch.randint(7, (50,))
    assert torch.equal(sizes(labels, torch.zeros(7)), torch.bincount(labels, minlength=7).float())
    assert not sizes(labels[:0], torch.zeros(7)).any()
