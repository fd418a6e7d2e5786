"""The configuration of a run: open values are filled in once, in a copy."""

import copy

import pytest

from deepclust.config.build import build
from deepclust.errors import InputError
from deepclust.runs.resolve_config import resolve_config
from tests.conftest import compose_train


def test_open_values_are_read_off_the_images_and_the_given_configuration_stays():
    cfg = compose_train("dataset=digits", "hardware=cpu")
    given = copy.deepcopy(cfg)
    resolved, estimate = resolve_config(cfg, build(cfg.dataset.source), None)
    assert cfg == given and estimate is None
    assert resolved.dataset.num_images == 1797 and resolved.dataset.num_clusters == 10
    assert resolved.earlier.run is None and resolved.hardware.devices == 1
    assert resolve_config(resolved, build(cfg.dataset.source), None)[0] == resolved


def test_a_run_before_is_recorded():
    cfg = compose_train("dataset=digits", "hardware=cpu")
    earlier = {"run": "DIR", "method": {"_target_": "x"}, "sha256": "0" * 64, "train_seconds": 2.5}
    resolved, _ = resolve_config(cfg, build(cfg.dataset.source), earlier)
    assert resolved.earlier == earlier


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("dataset.num_images=5", "set dataset.num_images=1797"),
        ("dataset.num_clusters=1798", "between 1 cluster and one for each image"),
        ("dataset.num_clusters=many", "the number of clusters to find"),
    ],
)
def test_what_contradicts_the_images_is_named(override, text):
    cfg = compose_train("dataset=digits", "hardware=cpu", override)
    with pytest.raises(InputError, match=text):
        resolve_config(cfg, build(cfg.dataset.source), None)
