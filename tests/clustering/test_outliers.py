"""Outliers: images far from all others are found, the same ones each time, and few others."""

import numpy as np
import pytest

from deepclust.clustering import outliers
from deepclust.clustering.outliers import choose_outliers, score_outliers


def make_features(count: int, num_foreign: int) -> np.ndarray:
    """Return features (count, 40) in three groups, but the last `num_foreign` point elsewhere, each on its own."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (3, 40))
    rows = centres[np.arange(count) % 3] + rng.normal(0, 0.3, (count, 40))
    rows[count - num_foreign :] = rng.normal(0, 1, (num_foreign, 40))
    return rows.astype(np.float32)


@pytest.mark.parametrize("max_fitted", [10_000, 150])
def test_images_unlike_all_others_come_first(max_fitted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outliers, "MAX_FITTED", max_fitted)
    features = make_features(400, 4)
    scores = score_outliers(features, seed=0)
    found = choose_outliers(scores).tolist()
    assert set(found[:4]) == {396, 397, 398, 399} and len(found) < 25
    assert scores[found].tolist() == sorted(scores[found], reverse=True)
    np.testing.assert_array_equal(scores, score_outliers(features, seed=0))


def test_copies_are_no_dense_place() -> None:
    """Without the mark the copies would make all others around them look isolated."""
    features = make_features(300, 0)
    features[200:] = features[0] + 1e-4 * np.random.default_rng(1).normal(size=(100, 40)).astype(np.float32)
    repeated = np.arange(300) >= 200
    assert score_outliers(features, seed=0, repeated=repeated).max() < score_outliers(features, seed=0).max()


def test_few_images_and_equal_ones_have_no_outliers() -> None:
    scores = score_outliers(make_features(20, 2), seed=0)
    assert (scores == 1).all() and len(choose_outliers(scores)) == 0
    assert len(choose_outliers(np.empty(0))) == 0
