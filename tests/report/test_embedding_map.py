"""The map of the images: which images are on it, and where."""

import numpy as np
import torch

from deepclust.report.embedding_map import compute_embedding_map, compute_projections
from tests.report.pages import make_digits_map


def test_the_map_is_the_same_each_time_and_a_sample_of_many() -> None:
    first = make_digits_map(200, max_points=50)
    again = make_digits_map(200, max_points=50)
    other = make_digits_map(200, max_points=50, seed=1)
    assert len(first.indices) == 50 and first.num_images == 200
    np.testing.assert_array_equal(first.indices, again.indices)
    for name in first.projections:
        np.testing.assert_array_equal(first.projections[name], again.projections[name])
    assert set(first.indices) != set(other.indices)


def test_t_sne_keeps_separate_groups_apart() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(3), 30)
    points = (100 * np.eye(3)[groups] + rng.normal(size=(90, 3))).astype(np.float32)
    for projected in compute_projections(points, seed=0).values():
        distance = np.linalg.norm(projected[:, None] - projected[None], axis=2)
        is_same_group = groups[:, None] == groups
        assert distance[is_same_group].max() < distance[~is_same_group].min()


def test_principal_components_are_those_of_a_singular_value_decomposition() -> None:
    points = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32) * [9, 5, 1, 1, 1, 1]
    components = compute_projections(points.astype(np.float32), seed=0)["principal components"]
    left, values, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    expected = left[:, :2] * values[:2]
    norms = np.linalg.norm(components, axis=0) * np.linalg.norm(expected, axis=0)
    np.testing.assert_allclose(np.abs((components * expected).sum(0) / norms), 1, atol=1e-5)  # cosine, up to the sign


def test_features_that_are_not_finite_are_left_out() -> None:
    features = torch.randn(20, 4)
    features[3, 2] = torch.nan
    zeros, ones = np.zeros(20, int), np.ones(20)
    embedding = compute_embedding_map(features, zeros, ones, source=None, max_points=100, seed=0)
    assert embedding is not None and embedding.indices.tolist() == [i for i in range(20) if i != 3]
    assert compute_embedding_map(features * torch.nan, zeros, ones, source=None, max_points=100, seed=0) is None
    assert compute_embedding_map(features, zeros, ones, source=None, max_points=0, seed=0) is None
