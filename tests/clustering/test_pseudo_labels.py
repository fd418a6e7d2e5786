"""Pseudo-labels equal the k-means that they come from, and last between E-steps."""

import torch
from torch.nn.functional import normalize

from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from deepclust.clustering.pseudo_labels import PseudoLabels

SETTINGS = {"max_iterations": 50, "tolerance": 1e-4}


def make_pseudo_labels():
    return PseudoLabels(num_images=60, num_clusters=3, num_features=4, restarts=2, **SETTINGS)


def test_pseudo_labels_are_those_of_spherical_k_means_and_its_nearest_centroids():
    features = torch.eye(3, 4).repeat(20, 1) + 0.05 * torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    pseudo_labels = make_pseudo_labels()
    pseudo_labels.update(features, ("test", 1))
    expected = kmeans_on_all_ranks(
        features, num_clusters=3, metric="cosine", num_restarts=2, key=("test", 1), **SETTINGS
    )
    assert torch.equal(pseudo_labels.assignments, expected.assignments)
    assert torch.equal(pseudo_labels.centroids, expected.centroids)
    assert torch.equal(pseudo_labels.logits(features, temperature=0.5).argmax(1), pseudo_labels.assignments)
    cosines = normalize(features, dim=1) @ normalize(pseudo_labels.centroids, dim=1).T
    torch.testing.assert_close(pseudo_labels.logits(3 * features, temperature=0.5), 2 * cosines)


def test_pseudo_labels_are_part_of_a_checkpoint():
    pseudo_labels, loaded = make_pseudo_labels(), make_pseudo_labels()
    pseudo_labels.update(torch.randn(60, 4), ("test",))
    loaded.load_state_dict(pseudo_labels.state_dict())
    assert torch.equal(loaded.assignments, pseudo_labels.assignments)
