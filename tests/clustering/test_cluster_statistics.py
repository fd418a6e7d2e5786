"""The statistics of clusters, against NumPy one cluster at a time, and of clusters without images."""

import numpy as np
import torch

from deepclust.clustering.cluster_statistics import ClusterStatistics, average_statistics, pool_statistics

FLOOR = 1e-4


def test_statistics_are_those_of_each_cluster_by_itself():
    rng = np.random.default_rng(0)
    features, assignments = rng.normal(3.0, 2.0, (30, 4)), rng.dirichlet(np.ones(3), 30)
    pooled = pool_statistics(torch.from_numpy(features), torch.from_numpy(assignments), variance_floor=FLOOR)
    for j, weights in enumerate(assignments.T):
        mean = np.average(features, axis=0, weights=weights)
        np.testing.assert_allclose(pooled.sizes[j], weights.sum())
        np.testing.assert_allclose(pooled.means[j], mean)
        variance = np.average((features - mean) ** 2, axis=0, weights=weights)
        np.testing.assert_allclose(pooled.variances[j], variance + FLOOR)


def test_an_empty_cluster_has_mean_0_and_the_variance_of_the_floor():
    features, assignments = torch.randn(5, 2), torch.eye(3)[torch.tensor([0, 0, 2, 0, 0])]
    floor = torch.full((2,), FLOOR)
    for rows in (slice(5), slice(0)):
        pooled = pool_statistics(features[rows], assignments[rows], variance_floor=FLOOR)
        assert pooled.sizes[1] == 0 and not pooled.means[1].any()
        torch.testing.assert_close(pooled.variances[1], floor)
        torch.testing.assert_close(pooled.variances[2], floor)  # of a single image


def test_features_far_from_0_keep_their_variance_in_32_bits():
    features = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    far = pool_statistics(features + 1000, torch.ones(1000, 1), variance_floor=FLOOR)
    torch.testing.assert_close(far.variances[0], features.var(0, correction=0) + FLOOR, rtol=1e-3, atol=0.0)


def test_the_average_moves_by_what_the_decay_leaves():
    ones = torch.ones(2, 3)
    earlier, later = ClusterStatistics(ones[:, 0], ones, ones), ClusterStatistics(3 * ones[:, 0], 5 * ones, 9 * ones)
    after = average_statistics(earlier, later, decay=0.75)
    assert [value.unique().tolist() for value in after] == [[1.5], [2.0], [3.0]]
