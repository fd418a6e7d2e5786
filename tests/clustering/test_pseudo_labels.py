"""Pseudo-labels: those of the k-means they stand for, and kept between E-steps."""

import torch
from torch.nn.functional import normalize

from deepclust.clustering.distributed_kmeans import dealt_kmeans
from deepclust.clustering.pseudo_labels import PseudoLabels

SETTINGS = {"max_iterations": 50, "tolerance": 1e-4}


def make_labels():
    return PseudoLabels(num_images=60, num_clusters=3, num_features=4, restarts=2, **SETTINGS)


def test_they_are_those_of_spherical_k_means_and_its_nearest_centroids():
    features = torch.eye(3, 4).repeat(20, 1) + 0.05 * torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    labels = make_labels()
    labels.renew(features, ("test", 1))
    expected = dealt_kmeans(features, num_clusters=3, metric="cosine", num_restarts=2, key=("test", 1), **SETTINGS)
    assert torch.equal(labels.assignments, expected.assignments)
    assert torch.equal(labels.centroids, expected.centroids)
    assert torch.equal(labels.logits(features, temperature=0.5).argmax(1), labels.assignments)
    cosines = normalize(features, dim=1) @ normalize(labels.centroids, dim=1).T
    torch.testing.assert_close(labels.logits(3 * features, temperature=0.5), 2 * cosines)


def test_they_outlive_a_checkpoint():
    labels, other = make_labels(), make_labels()
    labels.renew(torch.randn(60, 4), ("test",))
    other.load_state_dict(labels.state_dict())
    assert torch.equal(other.assignments, labels.assignments)
