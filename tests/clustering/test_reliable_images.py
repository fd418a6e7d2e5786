"""Fuzzy memberships, their certainty and the reliable rows against slow versions and by hand."""

import math

import pytest
import torch

from deepclust.clustering.reliable_images import fuzzy_memberships, measure_certainty, select_reliable


@pytest.mark.parametrize("fuzzifier", [1.2, 2.0, 5.0])
def test_memberships_and_certainty_by_the_formulas(fuzzifier):
    torch.manual_seed(0)
    z, centres = torch.randn(7, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    u = fuzzy_memberships(z, centres, fuzzifier=fuzzifier)
    for i in range(7):
        d = [float((z[i] - c).square().sum()) for c in centres]
        row = [1 / sum((a / b) ** (1 / (fuzzifier - 1)) for b in d) for a in d]
        assert u[i].tolist() == pytest.approx(row, rel=1e-9)
        entropy = -sum(x * math.log(x) for x in row)
        largest, second = sorted(row, reverse=True)[:2]
        assert float(measure_certainty(u, by="entropy")[i]) == pytest.approx(1 - entropy / math.log(4), abs=1e-9)
        assert float(measure_certainty(u, by="margin")[i]) == pytest.approx(largest - second, abs=1e-9)


def test_memberships_on_centres_and_far_away():
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e15, 0.0]])
    u = fuzzy_memberships(z, centres, fuzzifier=2.0)
    assert u[:2].tolist() == [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]
    torch.testing.assert_close(u[2], torch.full((3,), 1 / 3))
    assert measure_certainty(u[1:2], by="entropy").tolist() == measure_certainty(u[1:2], by="margin").tolist() == [1.0]
    assert fuzzy_memberships(z.bfloat16(), centres.bfloat16(), fuzzifier=1.01).isfinite().all()


@pytest.mark.parametrize("by", ["entropy", "margin"])
def test_a_single_cluster_is_certain(by):
    assert measure_certainty(torch.ones(3, 1), by=by).tolist() == [1.0, 1.0, 1.0]


def select_slowly(assignments, certainty, share, least, num_clusters):
    members = [[i for i, a in enumerate(assignments) if a == k] for k in range(num_clusters)]
    sizes = sorted(len(m) for m in members if m)
    median = (sizes[(len(sizes) - 1) // 2] + sizes[len(sizes) // 2]) // 2
    chosen = set()
    for rows in members:
        number = min(max(int(share * len(rows)), least), median, len(rows))
        chosen |= set(sorted(rows, key=lambda i: (-certainty[i], i))[:number])
    return [i in chosen for i in range(len(assignments))]


@pytest.mark.parametrize("seed", range(6))
def test_reliable_rows_are_those_of_a_slow_version(seed):
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_clusters = (1, 3, 40, 90, 91, 200)[seed], 6
    skew = torch.rand(num_clusters, generator=generator) ** 3 * torch.tensor([1, 1, 0, 1, 1, 1])  # one has no row
    assignments = torch.multinomial(skew, num_rows, replacement=True, generator=generator)
    certainty = (torch.rand(num_rows, generator=generator) * 10).round()  # many are equal
    for share, least in [(0.0, 1), (0.3, 2), (0.29, 5), (1.0, 1), (0.2, 1000)]:
        reliable = select_reliable(assignments, certainty, share=share, least=least, num_clusters=num_clusters)
        expected = select_slowly(assignments.tolist(), certainty.tolist(), share, least, num_clusters)
        assert reliable.tolist() == expected
        assert set(assignments[reliable].tolist()) == set(assignments.tolist()), "every cluster with rows has some"
