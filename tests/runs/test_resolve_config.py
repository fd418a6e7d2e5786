"""The configuration of a run: open values are filled in once, in a copy."""

import copy

import numpy as np
import pytest

from deepclust.config.build import build
from deepclust.datasets.image_sources import ArraySource, ImageSet
from deepclust.errors import InputError
from deepclust.runs.resolve_config import check_processes_have_images, resolve_config
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


@pytest.mark.parametrize(("num_images", "devices", "num_nodes"), [(3, 4, 1), (3, 2, 2), (1, 2, 1)])
def test_processes_without_an_image_are_refused(num_images, devices, num_nodes):
    cfg = compose_train(*("hardware=ddp", "hardware.accelerator=cpu"), f"hardware.devices={devices}")
    cfg.hardware.num_nodes = num_nodes
    source = ArraySource([np.zeros((num_images, 8, 8, 1), np.uint8)])
    images = ImageSet(source, source)
    with pytest.raises(InputError, match=f"{num_images} images? for {devices * num_nodes} processes.*hardware.devices"):
        check_processes_have_images(cfg, images)
    cfg.hardware.devices = cfg.hardware.num_nodes = 1
    check_processes_have_images(cfg, images)
