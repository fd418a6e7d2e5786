"""Epochs on the command line are those of the last stage, and a longer stage before it says so."""

import logging

import pytest

from deepclust.runs import earlier_stage
from deepclust.runs.earlier_stage import configure_earlier_stage, warn_of_long_stage
from tests.conftest import compose_train


@pytest.mark.parametrize(
    ("overrides", "is_told"),
    [
        (["trainer.max_epochs=1"], True),
        (["trainer.max_epochs=1", "before.trainer.max_epochs=1"], False),
        ([], False),
    ],
)
def test_a_longer_stage_before_is_told(overrides, is_told, caplog, monkeypatch):
    monkeypatch.setattr(earlier_stage.log, "disabled", False)  # as commands of other tests may have left it
    cfg = compose_train("method=scan", "dataset=digits", *overrides)
    cfg.overrides = overrides
    with caplog.at_level(logging.WARNING):
        warn_of_long_stage(cfg, configure_earlier_stage(cfg))
    assert ("trainer.max_epochs=1 is for the last stage alone" in caplog.text) == is_told
