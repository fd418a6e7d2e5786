"""Views are drawn for the global batch: each process makes its rows of the same views, on any device."""

import pytest
import torch

from deepclust.engine.randomness import make_generator
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
from tests.host_waits import find_host_operations_in_views
from tests.views.conftest import imitate_gpu, make_images, seeded_generator

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
        Cutout(p=0.5, max_side=0.5, even_sides=False, fill=None),
    ],
    "small": [crop(8)],
    "same": [],
}
NAMES = ["weak", "weak", "strong", "small"]


def make_multi_view(names=NAMES, *, mean=MEAN, std=STD):
    return MultiView(pipelines=PIPELINES, names=names, mean=mean, std=std)


def make_raw_images(n, channels=3, size=SIZE):
    """Return uint8 images (n, channels, size, size) as image sources give them: in channels-last memory order."""
    images = (make_images(n, channels, size) * 255).round().byte()
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def make_views(images, *key, rows=None, global_batch_size=None, **options):
    global_batch_size = global_batch_size or len(images)
    return make_multi_view(**options)(
        images, make_generator(*key), rows=rows or slice(0, global_batch_size), global_batch_size=global_batch_size
    )


def test_shapes_and_memory_order_of_views():
    views = make_views(make_raw_images(20), "a")
    assert [tuple(view.shape) for view in views] == [(20, 3, 16, 16)] * 3 + [(20, 3, 8, 8)]
    for view in views:
        assert view.dtype == torch.float32 and view.isfinite().all()
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(views[0], views[1])  # the same name twice has two draws


def test_views_of_grey_images():
    views = make_views(make_raw_images(20, channels=1), "a", mean=[0.3], std=[0.4])
    assert [tuple(view.shape) for view in views] == [(20, 1, 16, 16)] * 3 + [(20, 1, 8, 8)]
    assert all(view.is_contiguous() for view in views)


@pytest.mark.parametrize("name", ["weak", "strong", "small", "same"])
def test_parts_of_a_global_batch_have_the_views_of_the_whole_batch(name):
    images, names = make_raw_images(50), [name, name]
    whole = make_views(images, 7, names=names)
    for rows in (slice(0, 17), slice(17, 18), slice(18, 50)):
        for part, view in zip(
            make_views(images[rows], 7, rows=rows, global_batch_size=50, names=names), whole, strict=True
        ):
            torch.testing.assert_close(part, view[rows], rtol=0, atol=1e-5)


def test_views_do_not_depend_on_the_other_images_or_on_the_size_of_pieces():
    images = make_raw_images(50)
    whole = make_views(images, 7)
    others = images.flip(0).clone()
    others[10:20] = images[10:20]
    in_pieces = MultiView(pipelines=PIPELINES, names=NAMES, mean=MEAN, std=STD)
    in_pieces.piece_bytes = 1  # pieces of 16 images
    pieces = in_pieces(images, make_generator(7), rows=slice(0, 50), global_batch_size=50)
    for view, other, piece in zip(whole, make_views(others, 7), pieces, strict=True):
        torch.testing.assert_close(other[10:20], view[10:20], rtol=0, atol=1e-5)
        torch.testing.assert_close(piece, view, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_made_all_at_once_as_on_a_gpu_are_the_same(channels, monkeypatch):
    options = {"names": ["weak", "same", "strong", "weak"], "mean": MEAN[:channels], "std": STD[:channels]}
    expected = make_views(make_raw_images(20, channels), 7, **options)
    imitate_gpu(monkeypatch)
    actual = make_views(make_raw_images(20, channels), 7, **options)
    for view, expected_view in zip(actual, expected, strict=True):
        torch.testing.assert_close(view, expected_view, rtol=0, atol=1e-5)
        assert view.stride() == expected_view.stride()


def test_views_depend_on_the_random_key_only_and_do_not_touch_the_global_generator():
    images = make_raw_images(20)
    before = torch.get_rng_state()
    first, again, other = make_views(images, 1, "x"), make_views(images, 1, "x"), make_views(images, 2, "x")
    assert torch.equal(before, torch.get_rng_state())
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_inputs_are_not_changed():
    images = make_raw_images(20)
    original = images.clone()
    make_views(images, 0)
    assert torch.equal(images, original)
    for transform in (transform for pipeline in PIPELINES.values() for transform in pipeline):
        for channels in (1, 3):
            images = make_images(20, channels, SIZE)
            original = images.clone()
            transform.apply(images, transform.draw(20, seeded_generator()))
            assert torch.equal(images, original), type(transform).__name__


def test_every_transform_gives_values_from_0_to_1():
    for name in PIPELINES:
        for channels in (1, 3):
            (view,) = make_views(make_raw_images(64, channels), 3, names=[name], mean=None, std=None)
            assert view.min() >= -1e-5 and view.max() <= 1 + 1e-5, name


def test_clean_view_is_normalised_last_and_not_random():
    images = make_raw_images(6, size=32)
    expected = Resize(size=SIZE).apply(images.float() / 255, {})
    expected = (expected - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(make_multi_view().clean(images), expected, rtol=0, atol=1e-5)
    unnormalised = make_multi_view(mean=None, std=None).clean(make_raw_images(6))
    assert torch.equal(unnormalised, make_raw_images(6).float() / 255)


def test_a_pipeline_draws_for_each_of_its_transforms():
    pipeline = Pipeline([HorizontalFlip(p=0.5), Resize(size=8), HorizontalFlip(p=0.5)])
    draw = pipeline.draw(1000, seeded_generator())
    assert list(draw) == ["0.chosen", "2.chosen"] and not torch.equal(draw["0.chosen"], draw["2.chosen"])
    images = make_images(1000, 1, 8)
    both_or_neither = draw["0.chosen"] == draw["2.chosen"]
    flipped = pipeline.apply(images, draw)
    assert torch.equal(flipped[both_or_neither], images[both_or_neither])
    assert torch.equal(flipped[~both_or_neither], images[~both_or_neither].flip(-1))


def test_autocast_does_not_change_views():
    images = make_raw_images(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with_autocast = make_views(images, 0)
    assert all(torch.equal(a, b) for a, b in zip(with_autocast, make_views(images, 0), strict=True))


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
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        MultiView(**{"pipelines": PIPELINES, "names": ["weak"], "mean": MEAN, "std": STD} | options)


def test_images_with_other_channels_than_the_mean_are_refused():
    with pytest.raises(InputError, match=r"1 channels but dataset\.mean has 3 numbers"):
        make_multi_view().clean(make_raw_images(6, channels=1))
    with pytest.raises(InputError, match="expected one mean and one std per channel"):
        make_views(make_raw_images(6, channels=1), 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels", [1, 3])
def test_views_on_a_gpu_equal_those_on_a_cpu_and_need_no_waiting(channels):
    images = make_raw_images(64, channels)
    options = {"mean": MEAN[:channels], "std": STD[:channels]}
    expected = make_views(images, 5, **options)
    on_device = images.cuda()
    make_views(on_device, 5, **options)  # the libraries may wait while they load
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = make_views(on_device, 5, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for view, expected_view in zip(actual, expected, strict=True):
        difference = (view.cpu() - expected_view).abs()
        # Operations with steps (posterising, equalising, nearest pixel) may fall on the other side of one.
        assert (difference > 0.02).float().mean() < 0.01 and difference.median() < 1e-4


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("chosen", [False, True, None])
def test_every_transform_gives_the_same_when_it_runs_on_all_images_as_on_a_gpu(name, channels, chosen, monkeypatch):
    images = {n: make_images(n, channels, SIZE) for n in (1, 20)}
    cases = [
        (transform, n, transform.draw(n, seeded_generator(s)))
        for transform in PIPELINES[name]
        for n in images
        for s in (0, 1)
    ]
    for _, _, draw in cases:
        if chosen is not None and "chosen" in draw:
            draw["chosen"][:] = chosen
    expected = [transform.apply(images[n], draw) for transform, n, draw in cases]
    imitate_gpu(monkeypatch)
    for (transform, n, draw), expected_images in zip(cases, expected, strict=True):
        original = images[n].clone()
        torch.testing.assert_close(transform.apply(images[n], draw), expected_images, rtol=0, atol=1e-6)
        assert torch.equal(images[n], original), type(transform).__name__


def test_run_on_device_replaces_the_making_of_views(monkeypatch):
    imitate_gpu(monkeypatch)
    images, views, render_by_key = make_raw_images(20), make_multi_view(["weak", "strong", "weak"]), {}

    def all_views():
        training_views = [
            views(images, make_generator(seed), rows=slice(0, 20), global_batch_size=20) for seed in range(2)
        ]
        return [*sum(training_views, ()), views.clean(images), views.clean(images.float())]

    expected = all_views()
    # The first function of a key also gets the tensors of later calls, as a CUDA graph does.
    views.run_on_device = lambda key, render, *tensors: render_by_key.setdefault(key, render)(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(all_views(), expected, strict=True))
    assert len(render_by_key) == 3  # the training views, and the clean view of bytes and of floats


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weak", "strong"])
def test_making_views_compiles_as_a_whole(name, monkeypatch):
    imitate_gpu(monkeypatch)
    images, views = make_raw_images(20), make_multi_view([name, name])
    expected = views(images, make_generator(0), rows=slice(0, 20), global_batch_size=20)

    def run_compiled(key, render, *tensors):
        return torch.compile(lambda *arguments: render(*arguments), fullgraph=True, dynamic=False)(*tensors)

    views.run_on_device = run_compiled
    for view, expected_view in zip(
        views(images, make_generator(0), rows=slice(0, 20), global_batch_size=20), expected, strict=True
    ):
        torch.testing.assert_close(view, expected_view, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_host_has_no_part_in_making_views_on_a_gpu(name, channels, monkeypatch):
    views = make_multi_view([name, name], mean=MEAN[:channels], std=STD[:channels])
    made_views, host_operations = find_host_operations_in_views(views, make_raw_images(20, channels), monkeypatch)
    sizes = [view.shape for view in make_views(make_raw_images(20, channels), 0, names=[name], mean=None, std=None)]
    assert not host_operations and [view.shape for view in made_views] == sizes * 2
