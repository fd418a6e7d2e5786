"""Exact products whatever the global settings, and the check for finite features."""

import math

import pytest
import torch

from deepclust.clustering.exact_products import exact_products, require_finite
from deepclust.clustering.kmeans import kmeans
from deepclust.errors import InputError
from tests.clustering.kmeans_reference import KEY, SETTINGS, make_blobs


def test_products_are_exact_and_settings_are_restored():
    rows = make_blobs(200, 64, 3)
    torch.set_float32_matmul_precision("medium")
    try:
        result = kmeans(rows, num_clusters=3, metric="cosine", restarts=[0], key=KEY, **SETTINGS)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = kmeans(rows, num_clusters=3, metric="cosine", restarts=[0], key=KEY, **SETTINGS)
    assert torch.equal(result.centroids, expected.centroids)


def test_there_are_no_gradients_inside_and_settings_are_restored_after_an_error():
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    with pytest.raises(KeyError), exact_products(torch.device("cpu")):
        assert not torch.is_grad_enabled() and backend.fp32_precision == "ieee"
        raise KeyError
    assert torch.is_grad_enabled() and backend.fp32_precision == before


def test_rows_that_are_not_finite_are_named():
    features = torch.ones(9, 2)
    require_finite(features)
    features[:7, 0] = math.nan
    with pytest.raises(InputError, match=r"in 7 of 9 feature rows \(0, 1, 2, 3, 4, \.\.\.\)"):
        require_finite(features)
