"""The rules of benchmarks/number_of_clusters.py where the number is plain, and how the two halves are judged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import block_diag
from sklearn.datasets import make_blobs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import number_of_clusters

    return number_of_clusters


def test_every_rule_but_the_erratic_ones_counts_separate_blobs(rules):
    rows = make_blobs(240, 5, centers=4, center_box=(-30, 30), random_state=0)[0]
    named = rules.name_numbers(torch.from_numpy(rows).float())
    assert named.pop("gap statistic") >= 4  # its margin is small
    assert set(named.values()) == {4}


def test_the_tree_and_the_modularity_of_separate_cliques(rules):
    clique = np.ones((5, 5)) - np.eye(5)
    graph = block_diag([clique] * 6, format="csr")
    assert rules.count_by_tree(graph) == 6
    assert rules.compute_modularity(graph, np.arange(30) // 5) == pytest.approx(1 - 1 / 6)


def test_a_combination_is_chosen_on_one_half_and_judged_on_the_other(rules):
    sets = [rules.LabelledSet(str(n), "x", None, 0, n) for n in (4, 10, 20, 30)]
    says = {"num_clusters": 1, "is_sure": False, "candidates": [1, 10]}
    results = [
        (labelled, {"silhouette": 2, "stability": k, "eigengap": 3 * k, "deepclust": says})
        for labelled, k in zip(sets, (4, 5, 21, 30), strict=True)
    ]
    figures = rules.compare_rules(results)
    chosen = figures["table"]["chosen on the first half: stability"]
    assert chosen["right"] == [2, 1] and chosen["said"] == {"4": 4, "10": 5, "20": 21, "30": 30}
    assert figures["sure"] == [0, 0] and figures["unsure"] == [0, 4] and figures["one_of_the_candidates"] == 1
    assert rules.combine_rules({"a": 4, "b": 9}, ["a", "b"]) == 6
    assert rules.combine_rules({"a": 4, "b": 9, "c": 50}, ["a", "b", "c"]) == 9
