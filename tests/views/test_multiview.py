"""MultiView: draws belong to places in the global batch; any part of it gives its rows of the same views."""

import pytest
import torch

from deepclust.engine.randomness import generator
from deepclust.errors import InputError
from deepclust.views.geometry import Affine, HorizontalFlip, RandomCrop, RandomResizedCrop, Resize
from deepclust.views.multiview import MultiView, Pipeline
from deepclust.views.photometry import (
    ColorJitter,
    Cutout,
    GaussianBlur,
    Grayscale,
    Intensity,
    PillowBlur,
    Solarize,
)
from deepclust.views.strong_augmentation import RandomOperations
from tests.host_waits import host_work
from tests.views.conftest import as_on_a_gpu, pictures, seeded

SIZE = 16
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def crop(size):
    return RandomResizedCrop(size=size, scale=(0.08, 1), ratio=(0.75, 1.33))


PIPELINES = {
    "clean": [Resize(size=SIZE)],
    "weak": [
        crop(SIZE),
        HorizontalFlip(p=0.5),
        ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
        Grayscale(p=0.2),
        GaussianBlur(p=0.5, kernel_size=23, sigma=(0.1, 2)),
        Solarize(p=0.2, threshold=0.5),
    ],
    "strong": [
        RandomCrop(size=SIZE, padding=2),
        Affine(rotate=15, translate=0.1, scale=(0.9, 1.1), shear=10),
        RandomOperations(
            count=4,
            rotate=(-30, 30),
            shear=(-0.1, 0.1),
            translate=(-0.1, 0.1),
            solarize=(0, 1),
            posterize=(4, 8),
            enhance=(0.05, 0.95),
        ),
        Intensity(brightness=0.2, contrast=0.2, gamma=0.2, noise=0.05, size=SIZE),
        PillowBlur(p=0.5, sigma=(0.1, 2)),
        Cutout(p=0.5, max_side=0.5, fill=None),
    ],
    "small": [crop(8)],
    "same": [],
}
NAMES = ["weak", "weak", "strong", "small"]


def multi_view(names=NAMES, *, mean=MEAN, std=STD):
    return MultiView(pipelines=PIPELINES, names=names, mean=mean, std=std)


def raw(n, channels=3, size=SIZE):
    """uint8 images (n, channels, size, size) as the sources give them: memory in the order N, H, W, C."""
    images = (pictures(n, channels, size) * 255).round().byte()
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def views_of(images, *key, rows=None, total=None, **options):
    total = total or len(images)
    return multi_view(**options)(images, generator(*key), rows=rows or slice(0, total), total=total)


def test_views_have_their_sizes_and_colour_is_channels_last():
    views = views_of(raw(20), "a")
    assert [tuple(view.shape) for view in views] == [(20, 3, 16, 16)] * 3 + [(20, 3, 8, 8)]
    for view in views:
        assert view.dtype == torch.float32 and view.isfinite().all()
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(views[0], views[1])  # one name twice, two draws


def test_one_channel():
    views = views_of(raw(20, channels=1), "a", mean=[0.3], std=[0.4])
    assert [tuple(view.shape) for view in views] == [(20, 1, 16, 16)] * 3 + [(20, 1, 8, 8)]
    assert all(view.is_contiguous() for view in views)


@pytest.mark.parametrize("name", ["weak", "strong", "small", "same"])
def test_rows_of_a_global_batch_are_the_rows_of_the_whole(name):
    images, names = raw(50), [name, name]
    whole = views_of(images, 7, names=names)
    for rows in (slice(0, 17), slice(17, 18), slice(18, 50)):
        for part, view in zip(views_of(images[rows], 7, rows=rows, total=50, names=names), whole, strict=True):
            torch.testing.assert_close(part, view[rows], rtol=0, atol=1e-5)


def test_views_do_not_depend_on_the_other_images_or_on_the_pieces():
    images = raw(50)
    whole = views_of(images, 7)
    others = images.flip(0).clone()
    others[10:20] = images[10:20]
    several = MultiView(pipelines=PIPELINES, names=NAMES, mean=MEAN, std=STD)
    several.piece_bytes = 1  # pieces of 16 images
    pieces = several(images, generator(7), rows=slice(0, 50), total=50)
    for view, other, piece in zip(whole, views_of(others, 7), pieces, strict=True):
        torch.testing.assert_close(other[10:20], view[10:20], rtol=0, atol=1e-5)
        torch.testing.assert_close(piece, view, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_views_of_a_pipeline_at_once_as_on_a_gpu_are_the_same(channels, monkeypatch):
    told = {"names": ["weak", "same", "strong", "weak"], "mean": MEAN[:channels], "std": STD[:channels]}
    acquire_run_lock = views_of(raw(20, channels), 7, **told)
    as_on_a_gpu(monkeypatch)
    together = views_of(raw(20, channels), 7, **told)
    for view, other in zip(acquire_run_lock, together, strict=True):
        torch.testing.assert_close(other, view, rtol=0, atol=1e-5)
        assert other.stride() == view.stride()


def test_views_are_a_function_of_the_key_and_leave_the_global_stream_alone():
    images = raw(20)
    before = torch.get_rng_state()
    first, again, other = views_of(images, 1, "x"), views_of(images, 1, "x"), views_of(images, 2, "x")
    assert torch.equal(before, torch.get_rng_state())
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_inputs_stay_as_they_are():
    images = raw(20)
    kept = images.clone()
    views_of(images, 0)
    assert torch.equal(images, kept)
    for transform in (transform for pipeline in PIPELINES.values() for transform in pipeline):
        for channels in (1, 3):
            pixels = pictures(20, channels, SIZE)
            kept = pixels.clone()
            transform.apply(pixels, transform.draw(20, seeded()))
            assert torch.equal(pixels, kept), type(transform).__name__


def test_every_transform_stays_within_black_and_white():
    for name in PIPELINES:
        for channels in (1, 3):
            (view,) = views_of(raw(64, channels), 3, names=[name], mean=None, std=None)
            assert view.min() >= -1e-5 and view.max() <= 1 + 1e-5, name


def test_clean_is_normalised_last_and_without_chance():
    images = raw(6, size=32)
    expected = Resize(size=SIZE).apply(images.float() / 255, {})
    expected = (expected - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(multi_view().clean(images), expected, rtol=0, atol=1e-5)
    same = multi_view(mean=None, std=None).clean(raw(6))
    assert torch.equal(same, raw(6).float() / 255)


def test_draws_of_a_pipeline_are_those_of_its_transforms():
    pipeline = Pipeline([HorizontalFlip(p=0.5), Resize(size=8), HorizontalFlip(p=0.5)])
    draw = pipeline.draw(1000, seeded())
    assert list(draw) == ["0.chosen", "2.chosen"] and not torch.equal(draw["0.chosen"], draw["2.chosen"])
    images = pictures(1000, 1, 8)
    twice = draw["0.chosen"] == draw["2.chosen"]
    flipped = pipeline.apply(images, draw)
    assert torch.equal(flipped[twice], images[twice])
    assert torch.equal(flipped[~twice], images[~twice].flip(-1))


def test_autocast_does_not_coarsen_views():
    images = raw(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = views_of(images, 0)
    assert all(torch.equal(a, b) for a, b in zip(inside, views_of(images, 0), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["weak", "bold"]}, "no pipeline 'bold'; expected one of clean, weak, strong, small, same"),
        ({"pipelines": {"weak": []}}, "no pipeline 'clean'; expected one of weak"),
        (
            {"pipelines": {"clean": [crop(8)], "weak": []}},
            "'clean' of the views draws random numbers",
        ),
        ({"mean": [0.5]}, r"dataset.mean is \[0.5\] but dataset.std is"),
        ({"std": None}, "dataset.std is None"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        MultiView(**{"pipelines": PIPELINES, "names": ["weak"], "mean": MEAN, "std": STD} | options)


def test_images_of_other_channels_than_the_mean_are_refused():
    with pytest.raises(InputError, match=r"1 channels but dataset\.mean has 3 numbers"):
        multi_view().clean(raw(6, channels=1))
    with pytest.raises(InputError, match="expected one mean and one std per channel"):
        views_of(raw(6, channels=1), 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels", [1, 3])
def test_gpu_gives_the_views_of_the_cpu_without_waiting(channels):
    images = raw(64, channels)
    options = {"mean": MEAN[:channels], "std": STD[:channels]}
    expected = views_of(images, 5, **options)
    on_device = images.cuda()
    views_of(on_device, 5, **options)  # the libraries may wait while they load
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = views_of(on_device, 5, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for view, other in zip(expected, found, strict=True):
        difference = (view - other.cpu()).abs()
        # operations with steps (posterise, equalise, nearest pixel) may take the other side of one
        assert (difference > 0.02).float().mean() < 0.01 and difference.median() < 1e-4


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("chosen", [False, True, None])
def test_every_transform_does_on_all_rows_what_it_does_on_those_picked(name, channels, chosen, monkeypatch):
    images = {n: pictures(n, channels, SIZE) for n in (1, 20)}
    cases = [
        (transform, n, transform.draw(n, seeded(s))) for transform in PIPELINES[name] for n in images for s in (0, 1)
    ]
    for _, _, draw in cases:
        if chosen is not None and "chosen" in draw:
            draw["chosen"][:] = chosen
    expected = [transform.apply(images[n], draw) for transform, n, draw in cases]
    as_on_a_gpu(monkeypatch)
    for (transform, n, draw), known in zip(cases, expected, strict=True):
        kept = images[n].clone()
        torch.testing.assert_close(transform.apply(images[n], draw), known, rtol=0, atol=1e-6)
        assert torch.equal(images[n], kept), type(transform).__name__


def test_what_is_prepared_stands_in_for_the_making_of_views(monkeypatch):
    as_on_a_gpu(monkeypatch)
    images, views, made = raw(20), multi_view(["weak", "strong", "weak"]), {}

    def all_views():
        drawn = [views(images, generator(seed), rows=slice(0, 20), total=20) for seed in range(2)]
        return [*sum(drawn, ()), views.clean(images), views.clean(images.float())]

    expected = all_views()
    # what was to be done for a key at first meets the tensors of later calls, as in a graph
    views.prepared = lambda key, render, *tensors: made.setdefault(key, render)(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(all_views(), expected, strict=True))
    assert len(made) == 3  # two views of clean ones: of bytes and of floats


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weak", "strong"])
def test_views_compile_as_a_whole(name, monkeypatch):
    as_on_a_gpu(monkeypatch)
    images, views = raw(20), multi_view([name, name])
    expected = views(images, generator(0), rows=slice(0, 20), total=20)

    def prepared(key, render, *tensors):
        return torch.compile(lambda *given: render(*given), fullgraph=True, dynamic=False)(*tensors)

    views.prepared = prepared
    for view, known in zip(views(images, generator(0), rows=slice(0, 20), total=20), expected, strict=True):
        torch.testing.assert_close(view, known, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_host_has_no_part_in_making_views_on_a_gpu(name, channels, monkeypatch):
    views = multi_view([name, name], mean=MEAN[:channels], std=STD[:channels])
    made, found = host_work(views, raw(20, channels), monkeypatch)
    sizes = [view.shape for view in views_of(raw(20, channels), 0, names=[name], mean=None, std=None)]
    assert not found and [view.shape for view in made] == sizes * 2
