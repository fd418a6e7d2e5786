"""Scores against scikit-learn, however the samples come."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from deepclust.metrics import Contingency, cluster_health, matching, scores_from_table
from tests.test_distributed import on_processes


def fed(assignments, labels, num_clusters, num_classes, batches=1):
    metric = Contingency(num_clusters=num_clusters, num_classes=num_classes)
    for a, b in zip(torch.as_tensor(assignments).chunk(batches), torch.as_tensor(labels).chunk(batches), strict=True):
        metric.update(a, b)
    return metric


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scores_equal_scikit_learn(data):
    num_clusters, num_classes = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    size = data.draw(st.integers(1, 60))
    assignments = data.draw(st.lists(st.integers(0, num_clusters - 1), min_size=size, max_size=size))
    labels = data.draw(st.lists(st.integers(-1, num_classes - 1), min_size=size, max_size=size))
    metric = fed(assignments, labels, num_clusters, num_classes)
    known = [(a, b) for a, b in zip(assignments, labels, strict=True) if b >= 0]
    assert int(metric.unlabelled) == size - len(known)
    scores = metric.compute()
    if not known:
        assert all(np.isnan(value) for value in scores.values())
        return
    a, b = map(list, zip(*known, strict=True))
    assert scores["nmi"] == pytest.approx(reference.normalized_mutual_info_score(b, a), abs=1e-9)
    assert scores["ari"] == pytest.approx(reference.adjusted_rand_score(b, a), abs=1e-9)
    assert scores["ami"] == pytest.approx(reference.adjusted_mutual_info_score(b, a), abs=1e-9)
    slots = range(max(num_clusters, num_classes))
    best = max(sum(a_i == order[b_i] for a_i, b_i in known) for order in permutations(slots, num_classes))
    assert scores["acc"] == pytest.approx(best / len(known))
    assert scores["acc"] <= scores["purity"] <= 1


def test_hand_worked():
    #          cluster 0  1  2
    table = torch.tensor([[3, 1, 0], [0, 0, 2]])
    scores = scores_from_table(table)
    assert scores["acc"] == 5 / 6 and scores["purity"] == 1.0
    assert matching(table) == {0: 0, 2: 1}


@pytest.mark.parametrize("batches", [1, 2, 7])
def test_batches_add_up(batches):
    drawn = np.random.default_rng(0)
    assignments, labels = drawn.integers(0, 5, 500), drawn.integers(-1, 3, 500)
    assert fed(assignments, labels, 5, 3, batches).compute() == fed(assignments, labels, 5, 3).compute()


def test_exact_at_imagenet_size():
    drawn = np.random.default_rng(1)
    size = 1_300_000
    labels = drawn.integers(0, 100, size)
    assignments = np.where(drawn.random(size) < 0.6, labels, drawn.integers(0, 100, size))
    scores = fed(assignments, labels, 100, 100).compute()
    assert scores["ari"] == pytest.approx(reference.adjusted_rand_score(labels, assignments), rel=1e-9)
    assert scores["nmi"] == pytest.approx(reference.normalized_mutual_info_score(labels, assignments), rel=1e-9)
    collapsed = fed(np.zeros(size, int), labels, 100, 100).compute()
    assert collapsed["ari"] == 0 and collapsed["nmi"] == 0


def test_out_of_range_is_refused():
    with pytest.raises(ValueError, match="expected 0 to 2"):
        fed([0, 3], [0, 0], 3, 1)
    with pytest.raises(ValueError, match="below 1"):
        fed([0, 1], [0, 1], 3, 1)


def _share(rank):
    """Rank 1 sees nothing, the others unequal shares of 0..9."""
    metric = Contingency(num_clusters=3, num_classes=2)
    rows = {0: torch.arange(3), 1: torch.arange(0), 2: torch.arange(3, 10)}[rank]
    if len(rows):
        metric.update(rows % 3, rows % 2)
    return metric.compute()


def test_processes_add_up_with_one_that_saw_nothing(tmp_path):
    rows = torch.arange(10)
    whole = fed(rows % 3, rows % 2, 3, 2).compute()
    assert all(got == whole for got in on_processes(_share, 3, tmp_path))


def test_health():
    assert cluster_health(torch.tensor([5, 5])) == {
        "cluster_size_entropy": pytest.approx(1.0),
        "empty_clusters": 0,
        "largest_cluster": 0.5,
    }
    assert cluster_health(torch.tensor([10, 0, 0])) == {
        "cluster_size_entropy": 0.0,
        "empty_clusters": 2,
        "largest_cluster": 1.0,
    }
    assert cluster_health(torch.tensor([4]))["cluster_size_entropy"] == 1.0
