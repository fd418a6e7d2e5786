"""A batch is no larger than the data set, unless the command names a larger one, which is refused."""

import logging

import numpy as np
import pytest

from deepclust.datasets.image_sources import ArraySource, ImageSet
from deepclust.runs import batch_size
from deepclust.runs.batch_size import fit_batch_size, is_batch_size_named
from deepclust.runs.resolve_config import resolve_config
from deepclust.runs.resume_checks import fill_open_values
from tests.conftest import compose_train


@pytest.mark.parametrize(
    ("num_images", "overrides", "expected"),
    [
        (100, [], 100),
        (10_000, [], 256),
        (256, [], 256),
        (100, ["drop_last=false"], 256),  # such a batch need not be full
        (100, ["trainer.max_epochs=0"], 256),
        (103, ["batch_norm_groups=4"], 100),
        (103, ["hardware.devices=2"], 102),
    ],
)
def test_batch_fits_the_images(num_images, overrides, expected):
    cfg = compose_train("dataset=digits", "hardware=cpu", "batch_size=256", *overrides)
    assert fit_batch_size(cfg, num_images) == expected


def test_a_size_that_the_command_names_stays():
    cfg = compose_train("dataset=digits", "hardware=cpu", "batch_size=256")
    for key in ("batch_size", "+batch_size", "before.batch_size"):
        cfg.overrides = [f"{key}=256"]
        assert fit_batch_size(cfg, 100) == 256
    cfg.overrides = ["clean_batch_size=256", "batch_size=64"]
    assert not is_batch_size_named(256, cfg.overrides) and fit_batch_size(cfg, 100) == 100


def test_the_lower_size_is_told_recorded_and_taken_again(caplog, monkeypatch):
    monkeypatch.setattr(batch_size.log, "disabled", False)  # as commands of other tests may have left it
    cfg = compose_train("dataset=arrays", "dataset.path=A.npy", "hardware=cpu", "dataset.num_clusters=3")
    source = ArraySource([np.zeros((90, 8, 8, 1), np.uint8)])
    with caplog.at_level(logging.WARNING):
        resolved, _ = resolve_config(cfg, ImageSet(source, source), None)
    assert cfg.batch_size > 90 and resolved.batch_size == 90
    assert f"batch_size is 90 in place of {cfg.batch_size}, for there are 90 images" in caplog.text
    from deepclust.config.plain_values import resolve_to_dict

    again = fill_open_values(cfg, {"config": resolve_to_dict(resolved)})
    assert again.batch_size == 90
