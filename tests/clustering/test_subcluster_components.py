"""The tree of sub-cluster components and its cuts, against slow versions written from the equations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from deepclust.clustering.cluster_tree import ClusterTree, count_clusters
from deepclust.clustering.dendrogram_purity import dendrogram_purity
from deepclust.clustering.flat_cuts import best_level, compute_modularities, exact_cut, nearest_cut
from deepclust.clustering.neighbor_graph import build_cosine_graph
from deepclust.clustering.subcluster_components import agglomerate, choose_threshold_range


def draw_rows(num_rows, seed, *, values=0):
    """Return rows (M, 3); with `values` they take few values, so that many are equal or equally similar."""
    random = np.random.default_rng(seed)
    rows = random.integers(-values, values + 1, (num_rows, 3)) if values else random.standard_normal((num_rows, 3))
    return torch.from_numpy(rows.astype(np.float32))


def build_tree(rows, *, k=4, num_rounds=20, only_mutual=False):
    graph = build_cosine_graph(rows, k)
    thresholds = np.geomspace(*choose_threshold_range(graph), num_rounds)
    return graph, agglomerate(graph, thresholds, only_mutual=only_mutual), thresholds


def link_slowly(weights, labels, threshold):
    """Return the partition after one round, with the sums of all pairs of clusters computed anew."""
    count = labels.max() + 1
    members = np.eye(count)[labels]
    averages = (members.T @ weights @ members) / np.outer(members.sum(0), members.sum(0))
    np.fill_diagonal(averages, 0)
    group = np.arange(count)
    for cluster in range(count):
        best = averages[cluster].argmax()
        if averages[cluster, best] >= threshold and averages[cluster, best] > 0:
            group[group == group[best]] = group[cluster]
    _, first, inverse = np.unique(group[labels], return_index=True, return_inverse=True)
    return first.argsort().argsort()[inverse]


few_rows = st.tuples(st.integers(1, 25), st.integers(0, 1000), st.sampled_from([0, 1, 2]), st.integers(1, 30))


@settings(deadline=None, max_examples=60)
@given(few_rows)
def test_rounds_are_those_of_the_definition(drawn):
    num_rows, seed, values, k = drawn
    graph, partitions, thresholds = build_tree(draw_rows(num_rows, seed, values=values), k=k)
    labels, weights = np.arange(num_rows), graph.dense().numpy()
    for found, threshold in zip(partitions, thresholds, strict=False):
        labels = link_slowly(weights, labels, threshold)
        assert np.array_equal(found, labels)
    between = weights[labels[:, None] != labels]
    assert not between.any() or len(partitions) == len(thresholds)


@settings(deadline=None, max_examples=60)
@given(few_rows, st.integers(1, 30))
def test_cuts_have_the_number_of_clusters_that_was_asked_for(drawn, num_clusters):
    num_rows, seed, values, k = drawn
    rows = draw_rows(num_rows, seed, values=values)
    graph, partitions, _ = build_tree(rows, k=k)
    counts = count_clusters(partitions)
    exact = exact_cut(partitions, num_clusters, graph, rows.numpy())
    assert len(np.unique(exact)) == exact.max() + 1 == min(num_clusters, num_rows)
    nearest = nearest_cut(partitions, num_clusters)
    assert abs(nearest.max() + 1 - num_clusters) == np.abs(counts - num_clusters).min()
    values_of_levels = compute_modularities(partitions, graph)
    assert np.isfinite(values_of_levels).all() and counts[best_level(values_of_levels)] >= 1
    for labels in (exact, nearest):  # numbered by first member
        assert np.array_equal(np.unique(labels, return_index=True)[1], np.sort(np.unique(labels, return_index=True)[1]))


@pytest.mark.parametrize("num_clusters", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_an_exact_cut_joins_the_best_pair_again_and_again(k, num_clusters):
    rows = draw_rows(30, 3)
    graph, partitions, _ = build_tree(rows, k=k, num_rounds=3)
    labels = np.arange(30) if len(partitions) == 0 else partitions[count_clusters(partitions)[1:] >= num_clusters][-1]
    weights, unit_rows = graph.dense().numpy(), normalize(rows, dim=1).double().numpy()
    while (count := labels.max() + 1) > num_clusters:
        members = np.eye(count)[labels]
        averages = np.triu((members.T @ weights @ members) / np.outer(members.sum(0), members.sum(0)), 1)
        if averages.max() <= 0:
            means = members.T @ unit_rows
            means /= np.linalg.norm(means, axis=1, keepdims=True)
            averages = np.where(np.triu(np.ones((count, count)), 1) > 0, means @ means.T, -np.inf)
        first, second = np.unravel_index(averages.argmax(), averages.shape)
        labels = np.where(labels == second, first, labels) - (labels > second)
    assert np.array_equal(exact_cut(partitions, num_clusters, graph, rows.numpy()), labels)


def test_dendrogram_purity_is_the_mean_over_all_pairs_of_known_classes():
    _, partitions, _ = build_tree(draw_rows(40, 0))
    classes = np.random.default_rng(0).integers(-1, 3, 40)
    levels = [np.arange(40), *partitions, np.zeros(40, dtype=int)]
    shares = []
    for i in range(40):
        for j in range(i):
            if classes[i] == classes[j] >= 0:
                below = next(labels == labels[i] for labels in levels if labels[i] == labels[j])
                shares.append((classes[below & (classes >= 0)] == classes[i]).mean())
    assert dendrogram_purity(partitions, classes) == pytest.approx(np.mean(shares), abs=1e-12)
    assert dendrogram_purity(partitions, np.arange(40)) is None
    assert dendrogram_purity(partitions, np.full(40, -1)) is None


def test_modularity_of_two_cliques_by_hand():
    rows = torch.tensor([[1.0, 0.0]] * 4 + [[0.6, 0.8]] * 4)
    graph, partitions, _ = build_tree(rows, k=4)
    assert count_clusters(partitions).tolist()[:2] == [8, 2]  # duplicates join in the first round
    values = compute_modularities(partitions, graph)
    assert values[0] == pytest.approx(-8 / 64) and values[1] == pytest.approx(0.5) and best_level(values) == 1


def test_similarities_that_are_not_positive_are_shifted_and_opposite_rows_have_no_edge():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    expected = torch.tensor([[0, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0]], dtype=torch.float64)
    assert torch.equal(build_cosine_graph(rows, 9).dense(), expected)
    graph = build_cosine_graph(rows[[0, 2]], 2)
    assert len(graph.weights) == 0 and build_tree(rows[[0, 2]])[1].shape == (0, 2)


def test_merges_of_flat_clusters_join_what_rounds_join():
    tree = ClusterTree(
        partitions=np.array([[0, 0, 1, 2, 3, 4], [0, 0, 0, 1, 1, 2]], dtype=np.int32),
        thresholds=np.array([1.0, -np.inf]),
        modularities=np.zeros(3),
        assignments=np.array([0, 0, 1, 2, 2, 3]),
    )
    merges = [(m.first, m.second, m.distance) for m in tree.list_merges()]
    assert merges == [([0], [1], 2.0), ([0, 1], [2], 3.0), ([0, 1, 2], [3], 3.0)]
    summary = tree.summarize()
    assert summary["num_clusters"] == [6, 5, 3] and summary["thresholds"] == [None, 1.0, None]


def test_the_summary_of_a_tree_has_its_first_hundred_merges():
    leaves = np.arange(150)
    tree = ClusterTree(
        partitions=np.zeros((1, 150), dtype=np.int32),
        thresholds=np.array([1.0]),
        modularities=np.zeros(2),
        assignments=leaves,
    )
    assert len(tree.list_merges()) == 149 and len(tree.summarize()["merges"]) == 100
