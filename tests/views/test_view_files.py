"""The pipelines in conf/views: they build, give the size asked for, and say what the papers say."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from deepclust.config.build import build
from deepclust.engine.randomness import generator
from deepclust.views.multiview import MultiView
from tests.host_waits import host_work
from tests.views.conftest import as_on_a_gpu, pictures

FILES = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "views").glob("*.yaml"))
CONTENT = {
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
    "secu_imagenet": {"clean", "first", "second", "single", "small"},
    "vectors": {"clean", "weak", "strong", "standard", "first", "second"},
}
CROPS = {"small": 96}  # pixels of the views that are smaller than the images


def build_views(name, *, size, channels, names):
    numbers = [0.4] * channels
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        cfg = compose(f"views/{name}", overrides=["+dataset.image_size=0", "+dataset.mean=null"])
    cfg.dataset = {"image_size": size, "mean": numbers}
    return MultiView(pipelines=build(cfg.views), names=names, mean=numbers, std=numbers)


def test_every_file_is_listed():
    assert set(FILES) == set(CONTENT)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3)])
def test_file_builds_and_gives_views_of_the_size_asked_for(name, size, channels):
    names = sorted(CONTENT[name] - {"clean"})
    views = build_views(name, size=size, channels=channels, names=names)
    assert set(views.pipelines) == CONTENT[name]
    images = (pictures(12, channels, size) * 255).byte()
    made = views(images, generator(0), rows=slice(0, 12), total=12)
    for view, view_name in zip((*made, views.clean(images)), (*names, "clean"), strict=True):
        pixels = CROPS.get(view_name, size)
        assert view.shape == (12, channels, pixels, pixels) and view.isfinite().all()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("channels", [1, 3])
def test_file_gives_the_same_views_on_all_rows_at_once(name, channels, monkeypatch):
    names = sorted(CONTENT[name]) * 2
    views = build_views(name, size=16, channels=channels, names=names)
    cases = [((pictures(n, channels, 16, 18) * 255).byte(), seed) for n in (1, 12) for seed in range(4)]
    if name == "vectors":
        cases = [(images.float(), seed) for images, seed in cases]

    def made():
        return [views(images, generator(s), rows=slice(0, len(images)), total=len(images)) for images, s in cases]

    expected = made()
    as_on_a_gpu(monkeypatch)
    for found, known in zip(made(), expected, strict=True):
        for view, other in zip(found, known, strict=True):
            torch.testing.assert_close(view, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_host_has_no_part_in_making_the_views_of_a_file_on_a_gpu(name, channels, monkeypatch):
    names = sorted(CONTENT[name]) * 2
    views = build_views(name, size=16, channels=channels, names=names)
    made, found = host_work(views, (pictures(12, channels, 16, 18) * 255).byte(), monkeypatch)
    assert not found and len(made) == len(names) and all(view.is_cuda for view in made)


def test_the_pair_of_byol_differs_in_blur_and_solarising_only():
    pipelines = build_views("byol", size=32, channels=3, names=["first", "second"]).pipelines
    first, second = pipelines["first"].transforms, pipelines["second"].transforms
    assert [type(t) for t in second[:5]] == [type(t) for t in first]
    assert [vars(t) for t in second[:4]] == [vars(t) for t in first[:4]]
    assert (first[4].p, second[4].p, second[5].p) == (1.0, 0.1, 0.2)


def test_strong_view_of_scan_is_filled_with_the_mean():
    views = build_views("simclr", size=32, channels=3, names=["strong"])
    cutout = views.pipelines["strong"].transforms[-1]
    holes = cutout.apply(torch.ones(64, 3, 32, 32), cutout.draw(64, generator(0)))
    assert set(holes.unique().tolist()) == {torch.tensor(0.4).item(), 1.0}


def test_digits_are_never_mirrored():
    for pipeline in build_views("digits", size=8, channels=1, names=["weak"]).pipelines.values():
        assert all("Flip" not in type(transform).__name__ for transform in pipeline.transforms)
