"""The two balance constraints against slow versions written from their equations."""

import math

import pytest
import torch

from deepclust.clustering.balanced_assignment import EntropyConstraint, SizeConstraint, cluster_sizes, cost_of_joining


def make_size_constraint(num_clusters, *, step=0.5, min_share=0.9):
    return SizeConstraint(num_clusters=num_clusters, step=step, min_share=min_share)


def make_entropy_constraint(counts, weight):
    constraint = EntropyConstraint(num_clusters=len(counts), weight=weight).double()
    constraint.counts.copy_(torch.tensor(counts, dtype=torch.float64))
    return constraint


@pytest.mark.parametrize("min_share", [0.4, 1.0])
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_duals_follow_their_equation(batch_size, min_share):
    clusters, generator = 6, torch.Generator().manual_seed(batch_size)
    constraint, expected = make_size_constraint(clusters, min_share=min_share), [0.0] * clusters
    for _ in range(10):
        assignments = torch.randint(clusters, (batch_size,), generator=generator)
        constraint.update(assignments, None)
        for k in range(clusters):
            expected[k] += 0.5 * (min_share / clusters - assignments.tolist().count(k) / batch_size)
            expected[k] = max(expected[k], 0.0) if min_share < 1 else expected[k]
    assert constraint.duals.tolist() == pytest.approx(expected, abs=1e-5)
    assert float(constraint.counts.sum()) == 10 * batch_size


def test_size_constraint_by_hand():
    constraint = make_size_constraint(2, step=1.0, min_share=0.8)
    similarities = torch.tensor([[0.9, 0.6], [0.8, 0.7], [0.5, 0.4], [0.9, 0.0]])
    assert constraint.assign(similarities, None).tolist() == [0, 0, 0, 0]
    constraint.update(torch.zeros(4, dtype=torch.int64), None)
    assert constraint.duals.tolist() == pytest.approx([0.0, 0.4])  # 0.4 - 1 is cut off at 0
    assert constraint.assign(similarities, None).tolist() == [1, 1, 1, 0]


def test_size_constraint_keeps_every_cluster_near_its_bound():
    """Where one cluster is nearest to all images, the others still come to their shares."""
    clusters, generator = 5, torch.Generator().manual_seed(0)
    constraint, assignments = make_size_constraint(clusters, step=0.1), []
    for _ in range(400):
        similarities = 0.1 * torch.randn(64, clusters, generator=generator)
        similarities[:, 0] += 1.0
        assignments.append(constraint.assign(similarities, None))
        constraint.update(assignments[-1], None)
    shares = torch.bincount(torch.cat(assignments[200:]), minlength=clusters) / (200 * 64)
    assert shares.min() > 0.95 * 0.9 / clusters


def test_duals_equal_the_authors_to_the_last_bit():
    """The order of the two steps matters, because unclipped duals sum up rounding errors."""
    generator = torch.Generator().manual_seed(0)
    constraint, duals = SizeConstraint(num_clusters=7, step=20.0, min_share=1.0), torch.zeros(7)
    for assignments in torch.randint(7, (200, 12), generator=generator):
        constraint.update(assignments, None)
        duals = duals - 20 / 12 * torch.bincount(assignments, minlength=7) + 20 * (1 / 7)
    assert torch.equal(constraint.duals, duals)


def test_the_end_of_an_epoch_resets_the_counts_of_the_size_constraint_only():
    constraint = make_size_constraint(3)
    constraint.update(torch.tensor([0, 0, 1]), None)
    duals = constraint.duals.clone()
    constraint.end_epoch()
    assert torch.equal(constraint.duals, duals) and not constraint.counts.any()
    entropy = make_entropy_constraint([3, 1], 1.0)
    entropy.end_epoch()
    assert entropy.counts.tolist() == [3, 1]


def p_log_p(p):
    return p * math.log(p) if p > 0 else 0.0


def negative_entropy(counts, total):
    return sum(p_log_p(n / total) for n in counts)


@pytest.mark.parametrize("counts", [[5, 1, 0, 12], [1, 0], [7], [1, 1, 1]])
def test_entropy_constraint_weighs_the_whole_distribution(counts):
    """The cost of each choice is the change of sum p log p when this image alone has moved."""
    weight, generator = 3.0 * sum(counts), torch.Generator().manual_seed(1)
    constraint, total = make_entropy_constraint(counts, weight), sum(counts)
    similarities = torch.randn(40, len(counts), generator=generator, dtype=torch.float64)
    occupied = torch.tensor([k for k, n in enumerate(counts) if n])
    previous = occupied[torch.randint(len(occupied), (40,), generator=generator)]
    expected = []
    for row, old in zip(similarities.tolist(), previous.tolist(), strict=True):
        costs = []
        for k in range(len(counts)):
            moved = list(counts)
            moved[old] -= 1
            moved[k] += 1
            costs.append(-row[k] + weight * (negative_entropy(moved, total) - negative_entropy(counts, total)))
        expected.append(costs.index(min(costs)))
    assert constraint.assign(similarities, previous).tolist() == expected
    expected = []
    for row in similarities.tolist():
        costs = [
            -row[k] + weight * (p_log_p((n + 1) / (total + 1)) - p_log_p(n / (total + 1))) for k, n in enumerate(counts)
        ]
        expected.append(costs.index(min(costs)))
    assert constraint.assign(similarities, None).tolist() == expected


def test_entropy_constraint_without_counts_takes_the_nearest():
    similarities = torch.randn(10, 4, dtype=torch.float64)
    assert torch.equal(make_entropy_constraint([0, 0, 0, 0], 50.0).assign(similarities, None), similarities.argmax(1))


def test_entropy_constraint_counts_each_image_once():
    constraint = make_entropy_constraint([0, 0, 0], 1.0)
    constraint.update(torch.tensor([0, 0, 1]), None)
    constraint.update(torch.tensor([2, 0]), torch.tensor([0, 1]))
    assert constraint.counts.tolist() == [2, 0, 1]
    constraint.update(torch.tensor([1, 1]), torch.tensor([-1, 2]))  # the first image was in no cluster
    assert constraint.counts.tolist() == [2, 2, 0]


def test_images_in_no_cluster_or_an_empty_one_are_assigned():
    constraint = make_entropy_constraint([4, 0, 2], 5.0)
    # The first image gains by joining the empty cluster. The second is taken to be in it already, and may stay.
    assert constraint.assign(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([-1, 1])).tolist() == [1, 1]
    assert all(math.isfinite(c) for c in cost_of_joining(constraint.counts, constraint.counts.sum()).tolist())


def test_cost_of_joining_is_exact_where_the_difference_cancels():
    counts = torch.tensor([0.0, 1.0, 12_811.0, 1_281_167.0])
    costs = cost_of_joining(counts, torch.tensor(1_281_168.0)).double()
    total = 1_281_168
    for n, value in zip(counts.double().tolist(), costs.tolist(), strict=True):
        p, one = n / total, 1 / total
        exact = (math.log(p + one) + n * math.log1p(1 / n)) / total if n else one * math.log(one)
        assert value == pytest.approx(exact, rel=1e-5)


def test_cluster_sizes_count_like_bincount():
    assignments = torch.randint(7, (50,))
    assert torch.equal(cluster_sizes(assignments, torch.zeros(7)), torch.bincount(assignments, minlength=7).float())
    assert not cluster_sizes(assignments[:0], torch.zeros(7)).any()
