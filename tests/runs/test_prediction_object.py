"""The table of predictions as pandas is given it, without pandas."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from deepclust.runs.prediction_object import Prediction


@pytest.fixture
def columns_for_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `to_frame` return the columns that it gives to `pandas.DataFrame`."""
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))


@pytest.mark.usefixtures("columns_for_pandas")
def test_clusters_with_names_have_a_column_of_them():
    labels, confidence, distance = np.array([2, 0, -1, 1]), np.array([0.9, 0.8, 0.0, 0.7]), np.full(4, np.nan)
    nameless = Prediction(labels, confidence, distance).to_frame()
    assert list(nameless) == ["cluster", "confidence", "distance"]
    named = Prediction(labels, confidence, distance, [], list("abcd"), {0: "cats", 2: "dogs"}).to_frame()
    assert list(named) == ["cluster", "confidence", "distance", "path", "name"]
    assert named["name"] == ["dogs", "cats", "", ""]  # cluster 1 has no name, the third image cannot be read
