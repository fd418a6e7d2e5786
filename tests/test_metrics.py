"""Scores against scikit-learn and hand-worked tables, for samples in any batches, order and processes."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from deepclust.errors import InputError
from deepclust.metrics import ClusteringScores, cluster_health, compute_scores, match_clusters_to_classes
from tests.processes import run_on_processes

SCORES = ("acc", "purity", "nmi", "ari", "ami")


def score(assignments, labels, num_clusters, num_classes, batches=1):
    """Update the metric batch by batch and return what it computes."""
    metric = ClusteringScores(num_clusters=num_clusters, num_classes=num_classes)
    assignments, labels = torch.as_tensor(assignments), torch.as_tensor(labels)
    for batch in zip(assignments.chunk(batches), labels.chunk(batches), strict=True):
        metric.update(*batch)
    return metric.compute()


@st.composite
def samples(draw):
    num_clusters, num_classes, size = draw(st.integers(1, 7)), draw(st.integers(1, 5)), draw(st.integers(1, 50))
    assignments = draw(st.lists(st.integers(0, num_clusters - 1), min_size=size, max_size=size))
    labels = draw(st.lists(st.integers(-1, num_classes - 1), min_size=size, max_size=size))
    return assignments, labels, num_clusters, num_classes


@settings(max_examples=80, deadline=None)
@given(samples())
def test_scores_equal_scikit_learn_and_brute_force(drawn):
    assignments, labels, num_clusters, num_classes = drawn
    result = score(*drawn)
    known = [(a, b) for a, b in zip(assignments, labels, strict=True) if b >= 0]
    assert result["num_unlabelled"] == len(labels) - len(known)
    assert result["sizes"] == np.bincount(assignments, minlength=num_clusters).tolist()
    if not known:
        assert all(result[name] is None for name in SCORES)
        return
    a, b = map(list, zip(*known, strict=True))
    assert result["nmi"] == pytest.approx(reference.normalized_mutual_info_score(b, a), abs=1e-9)
    assert result["ari"] == pytest.approx(reference.adjusted_rand_score(b, a), abs=1e-9)
    assert result["ami"] == pytest.approx(reference.adjusted_mutual_info_score(b, a), abs=1e-9)
    slots = range(max(num_clusters, num_classes))
    best = max(sum(a_i == order[b_i] for a_i, b_i in known) for order in permutations(slots, num_classes))
    assert result["acc"] == best / len(known)
    assert sum(result["mapping"][a_i] == b_i for a_i, b_i in known) == best
    matched = [label for label in result["mapping"] if label >= 0]
    assert len(set(matched)) == len(matched) == min(num_clusters, num_classes)
    majorities = [max((b.count(label) for label in set(b)), default=0) for b in _labels_by_cluster(known)]
    assert result["purity"] == sum(majorities) / len(known)


def _labels_by_cluster(known):
    return [[b for a, b in known if a == cluster] for cluster in {a for a, _ in known}]


@settings(max_examples=30, deadline=None)
@given(samples(), st.integers(2, 5), st.randoms(use_true_random=False))
def test_batches_and_numbering_of_clusters_do_not_matter(drawn, batches, random):
    assignments, labels, num_clusters, num_classes = drawn
    whole = score(*drawn)
    assert score(*drawn, batches=min(batches, len(labels))) == whole
    new_ids = random.sample(range(num_clusters), num_clusters)
    renumbered = score([new_ids[a] for a in assignments], labels, num_clusters, num_classes)
    for name in SCORES:
        expected = None if whole[name] is None else pytest.approx(whole[name], abs=1e-12)
        assert renumbered[name] == expected


def test_more_clusters_than_classes_by_hand():
    table = torch.tensor([[3, 1, 0], [0, 0, 2]])
    scores = compute_scores(table)
    assert scores["acc"] == 5 / 6
    assert scores["purity"] == 1
    assert match_clusters_to_classes(table).tolist() == [0, -1, 1]


def test_fewer_clusters_than_classes_by_hand():
    table = torch.tensor([[4, 0], [2, 1], [0, 3]])
    scores = compute_scores(table)
    assert scores["acc"] == 7 / 10
    assert scores["purity"] == 7 / 10
    assert match_clusters_to_classes(table).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([[6]], {"acc": 1, "purity": 1, "nmi": 1, "ari": 1, "ami": 1}),
        ([[3, 0], [0, 4]], {"acc": 1, "purity": 1, "nmi": 1, "ari": 1, "ami": 1}),
        ([[3, 0], [4, 0]], {"acc": 4 / 7, "purity": 4 / 7, "nmi": 0, "ari": 0, "ami": 0}),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], {"acc": 1, "purity": 1, "nmi": 1, "ari": 1, "ami": 1}),
        ([[1, 1], [1, 1]], {"acc": 0.5, "purity": 0.5, "nmi": 0, "ari": -0.5, "ami": -0.5}),
    ],
    ids=["one of each", "perfect", "collapsed", "single samples", "independent"],
)
def test_extreme_tables(table, expected):
    assert compute_scores(torch.tensor(table)) == pytest.approx(expected, abs=1e-12)


def test_without_labels_there_are_no_scores():
    result = score([0, 2, 2], [-1, -1, -1], 3, 0)
    assert all(result[name] is None for name in SCORES)
    assert result["mapping"] == [-1, -1, -1]
    assert result["sizes"] == [1, 0, 2] and result["num_unlabelled"] == 3


def test_exact_at_imagenet_size():
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 50, 1_300_000)
    assignments = np.where(generator.random(len(labels)) < 0.6, labels, generator.integers(0, 60, len(labels)))
    result = score(assignments, labels, 60, 50, batches=3)
    assert result["ari"] == pytest.approx(reference.adjusted_rand_score(labels, assignments), rel=1e-9)
    assert result["nmi"] == pytest.approx(reference.normalized_mutual_info_score(labels, assignments), rel=1e-9)
    collapsed = score(np.zeros(len(labels), int), labels, 60, 50)
    assert collapsed["ari"] == 0 and collapsed["nmi"] == 0 and collapsed["ami"] == 0


def test_a_thousand_classes_and_clusters():
    counts = np.random.default_rng(0).poisson(1.3, (1000, 1000)) + 500 * np.eye(1000, dtype=np.int64)
    entropies = [-(p * np.log(p)).sum() for p in (counts.sum(0) / counts.sum(), counts.sum(1) / counts.sum())]
    information = reference.mutual_info_score(None, None, contingency=counts)
    expected = 0.3182050043  # by sklearn.metrics.cluster.expected_mutual_information, in ten minutes
    ami = (information - expected) / (np.mean(entropies) - expected)
    assert compute_scores(torch.from_numpy(counts))["ami"] == pytest.approx(ami, abs=1e-9)


@pytest.mark.parametrize(("assignments", "labels"), [([0, 3], [0, 0]), ([0, -1], [0, 0]), ([0, 1], [0, 1])])
def test_ids_out_of_range_are_refused(assignments, labels):
    with pytest.raises(InputError, match=r"sample 1 .* labels below 1 and clusters from 0 to 2"):
        score(assignments, labels, 3, 1)


def _score_on_process(rank, edges):
    """Return the scores on process `rank`, which has samples edges[rank] to edges[rank + 1]."""
    rows = torch.arange(edges[rank], edges[rank + 1])
    metric = ClusteringScores(num_clusters=4, num_classes=3)
    if len(rows) > 0:
        metric.update(rows * 7 % 4, rows * 5 % 4 - 1)
    return metric.compute()


@pytest.mark.parametrize("edges", [[0, 3, 10], [0, 3, 3, 10]], ids=["2 processes", "3 processes, one without samples"])
def test_processes_add_up(edges, tmp_path):
    rows = torch.arange(10)
    whole = score(rows * 7 % 4, rows * 5 % 4 - 1, 4, 3)
    assert whole["num_unlabelled"] > 0
    assert all(result == whole for result in run_on_processes(_score_on_process, len(edges) - 1, tmp_path, edges))


def test_health():
    assert cluster_health(torch.tensor([5, 5])) == {"cluster_size_entropy": pytest.approx(1), "empty_clusters": 0}
    assert cluster_health(torch.tensor([10, 0, 0])) == {"cluster_size_entropy": 0, "empty_clusters": 2}
    assert cluster_health(torch.tensor([4])) == {"cluster_size_entropy": 1, "empty_clusters": 0}
    assert cluster_health(torch.tensor([0, 0])) == {"cluster_size_entropy": 0, "empty_clusters": 2}
    uneven = cluster_health(torch.tensor([8, 8, 16, 0]))["cluster_size_entropy"]
    assert uneven == pytest.approx((0.5 * 2 + 0.5) / 2)  # in bits: two quarters and a half, over log2 of 4
