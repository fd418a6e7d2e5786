"""Assignments, confidence and scores of an evaluation, on hand-worked features."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

from deepclust.callbacks.evaluation import Evaluator
from deepclust.clustering.assignment_rules import assign_to_centroids, cluster_means, mean_squared_distance

FEATURES = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 4.0]])
CENTROIDS = torch.tensor([[0.0, 1.0], [10.0, 2.0]])
ASSIGNMENTS = torch.tensor([0, 0, 1, 1])


def make_evaluator(labels):
    return Evaluator(
        images=None,
        labels=labels,
        num_classes=2,
        num_clusters=2,
        kmeans_restarts=1,
        kmeans_max_iterations=10,
        kmeans_tolerance=0.0,
        seed=0,
    )


def test_features_are_assigned_to_the_nearest_centroid_with_a_softmax_as_confidence():
    scale = mean_squared_distance(FEATURES, CENTROIDS, ASSIGNMENTS)
    assert scale == (1 + 1 + 4 + 4) / 4
    between = torch.cat([FEATURES, torch.tensor([[5.0, 1.5]])])
    assignments, confidence = assign_to_centroids(between, CENTROIDS, scale)
    assert torch.equal(assignments[:4], ASSIGNMENTS)
    squared_distances = torch.cdist(between, CENTROIDS).square()
    expected = torch.exp(-squared_distances / 5) / torch.exp(-squared_distances / 5).sum(1, keepdim=True)
    torch.testing.assert_close(confidence, expected.amax(1))
    assert confidence[4] == pytest.approx(0.5)


def test_cluster_means_are_nan_for_an_empty_cluster():
    means = cluster_means(FEATURES, ASSIGNMENTS, 3)
    assert torch.equal(means[:2], CENTROIDS) and means[2].isnan().all()


def test_scores_count_known_labels_only():
    assert make_evaluator(None).score(ASSIGNMENTS) is None
    assert make_evaluator(None).compute_contingency_table(ASSIGNMENTS) is None
    assert make_evaluator(np.array([-1, -1, -1, -1])).score(ASSIGNMENTS) is None
    evaluator = make_evaluator(np.array([1, 1, 0, -1]))
    assert evaluator.score(ASSIGNMENTS) == {"acc": 1.0, "nmi": 1.0, "ari": 1.0}
    assert evaluator.compute_contingency_table(ASSIGNMENTS).tolist() == [[0, 1], [2, 0]]


def test_results_have_the_ami_of_the_clusters(train_small):
    results, folder = train_small("trainer.max_epochs=1")
    rows = np.loadtxt(folder / "assignments.csv", delimiter=",", skiprows=1, usecols=(1, 3), dtype=int)
    assert results["ami"] == pytest.approx(adjusted_mutual_info_score(rows[:, 1], rows[:, 0]), abs=1e-9)
    assert set(results["scores"]["method"]) == {"acc", "nmi", "ari"}


def test_kmeans_on_some_rows_gives_every_row_its_nearest_centroid():
    rows = torch.cat([FEATURES, torch.tensor([[9.0, 2.0], [1.0, 1.0]])])
    result = replace(make_evaluator(None), kmeans_rows=np.array([0, 1, 2, 3])).run_kmeans(rows, purpose="test")
    fitted = make_evaluator(None).run_kmeans(FEATURES, purpose="test")
    assert torch.equal(result.centroids, fitted.centroids) and torch.equal(result.assignments[:4], fitted.assignments)
    assert result.assignments[4] == fitted.assignments[2] and result.assignments[5] == fitted.assignments[0]
