"""Whole images of different shapes: views as of each image by itself, whatever lies beside it in a batch."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode
from torchvision.transforms import RandomResizedCrop as OneImageCrop

from deepclust.batch import PaddedImages, pad_images
from deepclust.errors import InputError
from deepclust.views.geometry import CenterCrop, HorizontalFlip, RandomCrop, RandomResizedCrop, Resize, ResizeShortSide
from deepclust.views.multiview import MultiView, Pipeline, to_float_images
from deepclust.views.photometry import Grayscale
from tests.host_waits import HostWaits
from tests.views.conftest import assert_close, seeded_generator

BILINEAR = InterpolationMode.BILINEAR
INCEPTION = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
SHAPES = [(48, 64), (64, 48), (50, 50), (40, 90), (111, 41), (48, 64), (45, 47), (64, 48)]


def make_whole_images(shapes=SHAPES, channels=3):
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(1, 256, (*shape, channels), dtype=np.uint8)) for shape in shapes]


def pad(images) -> PaddedImages:
    return pad_images([image.numpy() for image in images], channels=3)


def as_float(image):
    return image.permute(2, 0, 1).float() / 255


def make_views(pipeline, **changes):
    settings = {"names": ["weak"], "mean": None, "std": None, **changes}
    return MultiView(pipelines={"clean": [Resize(size=24)], "weak": pipeline}, **settings)


def test_padded_images_come_apart_again():
    images = make_whole_images()
    padded = pad(images)
    assert padded.pixels.shape == (8, 3, 50, 111), "the longest of the short sides, and of the long ones"
    assert padded.pixels.is_contiguous(memory_format=torch.channels_last)
    for one, image in zip(padded.take_apart(), images, strict=True):
        assert np.array_equal(one, image.numpy())
    part = padded[5:]
    assert part.pixels.shape == (3, 3, 48, 64) and len(part) == 3
    assert np.array_equal(part.take_apart()[1], images[6].numpy())
    assert len(pad([])) == 0 and pad([]).take_apart() == []
    grey = pad_images([image.numpy() for image in make_whole_images(channels=1)], channels=3)
    assert grey.pixels.shape[1] == 3 and torch.equal(grey.pixels[:, 0], grey.pixels[:, 2])


@pytest.mark.parametrize("size", [24, 80])
def test_resized_crops_equal_torchvision_on_each_true_image(size):
    images, crop = make_whole_images(5 * SHAPES), RandomResizedCrop(size=size, **INCEPTION)
    draw = crop.draw(len(images), seeded_generator())
    whole = to_float_images(pad(images))
    boxes = crop.boxes_in(draw, whole.shapes).int().tolist()
    expected = [
        TF.resized_crop(as_float(image), *box, [size, size], BILINEAR, antialias=True)
        for image, box in zip(images, boxes, strict=True)
    ]
    assert_close(crop.apply_to_whole(whole, draw), torch.stack(expected), 1e-5)


def test_an_image_is_squeezed_whole_or_cut_in_the_centre():
    images = make_whole_images()
    whole = to_float_images(pad(images))
    squeezed = [TF.resize(as_float(image), [24, 24], BILINEAR, antialias=True) for image in images]
    assert_close(Resize(size=24).apply_to_whole(whole, {}), torch.stack(squeezed), 1e-5)
    centres = torch.stack([TF.center_crop(as_float(image), [31, 31]) for image in images])
    assert torch.equal(CenterCrop(size=31).apply_to_whole(whole, {}), centres)
    for fraction in (0.875, 1.0, 0.4):
        clean = Pipeline([ResizeShortSide(size=28, crop_fraction=fraction), CenterCrop(size=28)])
        resized = (TF.resize(as_float(image), [round(28 / fraction)], BILINEAR, antialias=True) for image in images)
        expected = torch.stack([TF.center_crop(image, [28, 28]) for image in resized])
        assert_close(clean.apply(whole, {}), expected, 1e-5)


@pytest.mark.parametrize("padding", [0, 6])
def test_flips_and_random_crops_equal_those_of_each_true_image(padding):
    images = make_whole_images()
    pipeline = Pipeline([HorizontalFlip(p=0.5), RandomCrop(size=36, padding=padding), HorizontalFlip(p=0.5)])
    draw = pipeline.draw(len(images), seeded_generator(3))
    assert draw["0.chosen"].any() and not draw["0.chosen"].all()
    together = pipeline.apply(to_float_images(pad(images)), draw)
    for row, image in enumerate(images):
        own = {name: values[row : row + 1] for name, values in draw.items()}
        assert torch.equal(together[row], pipeline.apply(as_float(image)[None], own)[0])


STARTS = {
    "crop": [RandomResizedCrop(size=24, **INCEPTION)],
    "flip, crop": [HorizontalFlip(p=0.5), RandomResizedCrop(size=24, **INCEPTION)],
    "squeeze": [Resize(size=24), HorizontalFlip(p=0.5)],
    "centre": [ResizeShortSide(size=24, crop_fraction=0.8), CenterCrop(size=24)],
    "flip, random crop": [HorizontalFlip(p=0.5), RandomCrop(size=24, padding=2)],
    "resize, random crop": [ResizeShortSide(size=24, crop_fraction=0.8), RandomCrop(size=24, padding=0)],
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("on_device", [False, True])
def test_a_view_depends_neither_on_padding_nor_on_the_images_beside_it(start, on_device, monkeypatch):
    views = make_views(STARTS[start])
    if on_device:
        monkeypatch.setattr(MultiView, "_render_in_pieces", MultiView._render_all_at_once)
    shapes = 3 * SHAPES
    images = make_whole_images(shapes)
    n = len(images)

    def render(padded, rows):
        return views(padded, seeded_generator(), rows=rows, global_batch_size=n)[0]

    together = render(pad(images), slice(0, n))
    for row in range(n):
        assert_close(render(pad(images[row : row + 1]), slice(row, row + 1))[0], together[row], 1e-6)
    # One value in each image: a pixel of the padding, which is black, would darken a view.
    white = pad([torch.full_like(image, 255) for image in images])
    wide = PaddedImages(torch.nn.functional.pad(white.pixels, (0, 40, 0, 30)), white.shapes)
    if start != "flip, random crop":  # whose own padding is black
        assert_close(render(wide, slice(0, n)), torch.ones(n, 3, 24, 24), 1e-5)
    noise = torch.randint(0, 256, wide.pixels.shape, generator=seeded_generator(1), dtype=torch.uint8)
    is_padding = wide.pixels == 0
    noisy = PaddedImages(torch.where(is_padding, noise, wide.pixels), wide.shapes)
    assert_close(render(noisy, slice(0, n)), render(white, slice(0, n)), 1e-6)


def test_images_of_one_shape_get_the_boxes_that_they_have_always_had():
    crop = RandomResizedCrop(size=24, **INCEPTION)
    draw = crop.draw(50, seeded_generator())
    assert torch.equal(crop.boxes(draw, 48, 64), crop.boxes_in(draw, torch.tensor([[48, 64]]).expand(50, 2)))


def test_boxes_on_photographs_are_distributed_as_in_torchvision():
    n = 10_000
    shapes = torch.tensor([[256, 341]] * (n // 2) + [[341, 256]] * (n // 2))
    crop = RandomResizedCrop(size=224, **INCEPTION)
    boxes = crop.boxes_in(crop.draw(n, seeded_generator()), shapes).numpy()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        empty = {shape: torch.empty(1, *shape) for shape in ((256, 341), (341, 256))}
        reference = np.array(
            [OneImageCrop.get_params(empty[tuple(shape)], **INCEPTION_LISTS) for shape in shapes.tolist()], float
        )
    area = shapes.prod(1).numpy()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, n, 4))  # sides are whole: without it there are many ties
    ours, theirs = boxes + noise[0], reference + noise[1]
    compared = {
        "scale": [sample[:, 2] * sample[:, 3] / area for sample in (ours, theirs)],
        "aspect": [sample[:, 3] / sample[:, 2] for sample in (ours, theirs)],
        "top": [sample[:, 0] for sample in (ours, theirs)],
        "left": [sample[:, 1] for sample in (ours, theirs)],
    }
    for name, samples in compared.items():
        assert ks_2samp(*samples).pvalue > 0.01, name
    squares = crop.boxes(crop.draw(n, seeded_generator()), 256, 256).numpy()
    square_share = squares[:, 2] * squares[:, 3] / area  # of the whole image: what was lost by cutting first
    assert ks_2samp(square_share, compared["scale"][1]).pvalue < 1e-9


INCEPTION_LISTS = {name: list(pair) for name, pair in INCEPTION.items()}


def test_where_no_box_fits_each_image_gives_its_own_largest_one():
    crop = RandomResizedCrop(size=8, scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3))
    shapes = [(20, 60), (61, 20), (30, 30), (256, 2000)]
    boxes = crop.boxes_in(crop.draw(4, seeded_generator()), torch.tensor(shapes))
    for box, shape in zip(boxes.tolist(), shapes, strict=True):
        if shape != (30, 30):
            assert box == list(OneImageCrop.get_params(torch.empty(1, *shape), [1.0, 1.0], [3 / 4, 4 / 3]))


def test_views_of_whole_images_wait_for_no_device(monkeypatch):
    monkeypatch.setattr(MultiView, "_render_in_pieces", MultiView._render_all_at_once)
    monkeypatch.setattr(PaddedImages, "is_cpu", False)
    images = pad(make_whole_images())
    for transforms in (STARTS["crop"], STARTS["flip, crop"], STARTS["squeeze"]):
        with HostWaits([images.pixels, images.shapes]) as waits:
            make_views(transforms)(images, seeded_generator(), rows=slice(0, 8), global_batch_size=8)
        assert not waits.lines


def test_a_pipeline_that_leaves_shapes_different_is_refused():
    whole = to_float_images(pad(make_whole_images()))
    with pytest.raises(InputError, match="comes to Grayscale while the images still have shapes of their own"):
        Pipeline([Grayscale(p=1.0)]).apply(whole, Grayscale(p=1.0).draw(8, seeded_generator()))
    with pytest.raises(InputError, match="comes to its end while"):
        Pipeline([]).apply(whole, {})
    twice = Pipeline([ResizeShortSide(size=30, crop_fraction=1.0), RandomResizedCrop(size=24, **INCEPTION)])
    with pytest.raises(InputError, match=r"RandomResizedCrop comes after ResizeShortSide.*dataset\.stored_size"):
        twice.apply(whole, twice.draw(8, seeded_generator()))
    with pytest.raises(InputError, match="central crop of 41 pixels does not fit in images of 40 x 90"):
        CenterCrop(size=41).apply_to_whole(to_float_images(pad(make_whole_images(SHAPES[:4]))), {})
    with pytest.raises(InputError, match="random crop of 60 pixels does not fit"):
        Pipeline([RandomCrop(size=60, padding=0)]).apply(whole, {"0.position": torch.zeros(8, 2)})


@pytest.mark.parametrize("start", STARTS)
def test_views_are_made_where_float64_is_the_default(start):
    """As in a training with precision=64-true, in which images stay float32 until a network takes them."""
    images, n = pad(make_whole_images()), len(SHAPES)
    torch.set_default_dtype(torch.float64)
    try:
        views = make_views(STARTS[start])(images, seeded_generator(), rows=slice(0, n), global_batch_size=n)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert views.shape == (n, 3, 24, 24) and 0 <= views.amin() < views.amax() <= 1 + 1e-6
