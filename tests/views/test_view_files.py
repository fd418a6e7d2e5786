"""The pipelines in conf/views: they build, give views of the right size and follow the papers."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from deepclust.config.build import build
from deepclust.engine.randomness import make_generator
from deepclust.views.multiview import MultiView
from tests.host_waits import find_host_operations_in_views
from tests.views.conftest import imitate_gpu, make_images

FILES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "views").glob("*.yaml"))
PIPELINE_NAMES = {
    "propos": {"clean", "weak"},
    "propos_blur": {"clean", "weak"},
    "byol": {"clean", "first", "second"},
    "cc": {"clean", "weak"},
    "cc_strong": {"clean", "weak"},
    "cc_strong_blur": {"clean", "weak"},
    "simclr": {"clean", "weak", "strong", "standard"},
    "gcc": {"clean", "weak", "strong", "standard"},
    "scan": {"clean", "weak", "strong", "standard"},
    "digits": {"clean", "weak", "strong"},
    "secu": {"clean", "first", "second"},
    "self_evoc": {"clean", "weak"},
    "secu_imagenet": {"clean", "first", "second", "single", "small"},
    "vectors": {"clean", "weak", "strong", "standard", "first", "second"},
}
VIEW_SIZES = {"small": 96}  # pixels of the views that do not have the size of the images


def build_views(name, *, size, channels, names):
    mean = [0.4] * channels
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        cfg = compose(f"views/{name}", overrides=["+dataset.image_size=0", "+dataset.mean=null"])
    cfg.dataset = {"image_size": size, "mean": mean}
    return MultiView(pipelines=build(cfg.views), names=names, mean=mean, std=mean)


def test_every_file_is_listed():
    assert set(FILES) == set(PIPELINE_NAMES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3)])
def test_file_gives_views_of_the_image_size(name, size, channels):
    names = sorted(PIPELINE_NAMES[name] - {"clean"})
    views = build_views(name, size=size, channels=channels, names=names)
    assert set(views.pipelines) == PIPELINE_NAMES[name]
    images = (make_images(12, channels, size) * 255).byte()
    training_views = views(images, make_generator(0), rows=slice(0, 12), global_batch_size=12)
    for view, view_name in zip((*training_views, views.clean(images)), (*names, "clean"), strict=True):
        pixels = VIEW_SIZES.get(view_name, size)
        assert view.shape == (12, channels, pixels, pixels) and view.isfinite().all()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("channels", [1, 3])
def test_file_gives_the_same_views_all_at_once_as_on_a_gpu(name, channels, monkeypatch):
    names = sorted(PIPELINE_NAMES[name]) * 2
    views = build_views(name, size=16, channels=channels, names=names)
    cases = [((make_images(n, channels, 16, 18) * 255).byte(), seed) for n in (1, 12) for seed in range(4)]
    if name == "vectors":
        cases = [(images.float(), seed) for images, seed in cases]

    def make_all_views():
        return [
            views(images, make_generator(s), rows=slice(0, len(images)), global_batch_size=len(images))
            for images, s in cases
        ]

    expected = make_all_views()
    imitate_gpu(monkeypatch)
    for actual_views, expected_views in zip(make_all_views(), expected, strict=True):
        for view, expected_view in zip(actual_views, expected_views, strict=True):
            torch.testing.assert_close(view, expected_view, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_host_has_no_part_in_making_the_views_of_a_file_on_a_gpu(name, channels, monkeypatch):
    names = sorted(PIPELINE_NAMES[name]) * 2
    views = build_views(name, size=16, channels=channels, names=names)
    made_views, host_operations = find_host_operations_in_views(
        views, (make_images(12, channels, 16, 18) * 255).byte(), monkeypatch
    )
    assert not host_operations and len(made_views) == len(names) and all(view.is_cuda for view in made_views)


def test_views_of_byol_differ_in_blur_and_solarising_only():
    pipelines = build_views("byol", size=32, channels=3, names=["first", "second"]).pipelines
    first, second = pipelines["first"].transforms, pipelines["second"].transforms
    assert [type(t) for t in second[:5]] == [type(t) for t in first]
    assert [vars(t) for t in second[:4]] == [vars(t) for t in first[:4]]
    assert (first[4].p, second[4].p, second[5].p) == (1.0, 0.1, 0.2)


def test_cutout_of_scan_is_filled_with_the_mean():
    views = build_views("simclr", size=32, channels=3, names=["strong"])
    cutout = views.pipelines["strong"].transforms[-1]
    holes = cutout.apply(torch.ones(64, 3, 32, 32), cutout.draw(64, make_generator(0)))
    assert set(holes.unique().tolist()) == {torch.tensor(0.4).item(), 1.0}


def test_digits_are_never_mirrored():
    for pipeline in build_views("digits", size=8, channels=1, names=["weak"]).pipelines.values():
        assert all("Flip" not in type(transform).__name__ for transform in pipeline.transforms)
