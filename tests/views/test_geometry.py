"""Geometry against torchvision's functions for one image, given the same draw."""

import math

import pytest
import torch
import torchvision.transforms.functional as TF
from scipy.ndimage import affine_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms import RandomResizedCrop as OneImageCrop

from deepclust.errors import InputError
from deepclust.views.geometry import (
    Affine,
    CenterCrop,
    HorizontalFlip,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    ResizeShortSide,
    RotateAndShift,
)
from tests.views.conftest import assert_close, make_images, seeded_generator

BILINEAR = InterpolationMode.BILINEAR
INCEPTION = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(8, 8, 8), (32, 32, 32), (40, 56, 32), (32, 32, 80), (224, 224, 96)]
)
def test_resized_crop_equals_torchvision(channels, height, width, size):
    n = 12 if height > 100 else 40
    images, crop = make_images(n, channels, height, width), RandomResizedCrop(size=size, **INCEPTION)
    draw = crop.draw(n, seeded_generator())
    boxes = crop.boxes(draw, height, width).int().tolist()
    expected = [
        TF.resized_crop(image, *box, [size, size], BILINEAR, antialias=True)
        for image, box in zip(images, boxes, strict=True)
    ]
    assert_close(crop.apply(images, draw), torch.stack(expected), 1e-5)


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 32, (0.08, 1.0)), (48, 96, (0.5, 1.0))])
def test_crop_boxes_are_distributed_as_in_torchvision(height, width, scale):
    n = 4000
    crop = RandomResizedCrop(size=32, scale=scale, ratio=(3 / 4, 4 / 3))
    boxes = crop.boxes(crop.draw(n, seeded_generator()), height, width).double()
    image = torch.zeros(1, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = torch.tensor([OneImageCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)]).double()
    for sample, reference in ((boxes, expected), (boxes**2, expected**2), (boxes.prod(1), expected.prod(1))):
        error = (sample.var(0) / n + reference.var(0) / n).sqrt()
        assert ((sample.mean(0) - reference.mean(0)).abs() < 4.5 * error).all()
    corners, shapes = boxes[:, :2], boxes[:, 2:]
    assert (corners >= 0).all() and (corners + shapes <= torch.tensor([height, width])).all()
    assert torch.equal(corners, corners.round()) and torch.equal(shapes, shapes.round())


@pytest.mark.parametrize(("height", "width", "ratio"), [(20, 60, (0.5, 1.0)), (61, 20, (1.0, 2.0)), (9, 9, (5, 6))])
def test_where_no_box_fits_the_largest_central_one_is_taken(height, width, ratio):
    crop = RandomResizedCrop(size=8, scale=(1.0, 1.0), ratio=ratio)
    expected = OneImageCrop.get_params(torch.zeros(1, height, width), [1.0, 1.0], list(ratio))
    assert crop.boxes(crop.draw(3, seeded_generator()), height, width).tolist() == [list(expected)] * 3


def test_whole_image_as_box_is_the_image():
    images, crop = make_images(8, 3, 32), RandomResizedCrop(size=32, scale=(1, 1), ratio=(1, 1))
    assert_close(crop.apply(images, crop.draw(8, seeded_generator())), images, 1e-6)


def test_flip_equals_torchvision_and_has_its_probability():
    images, flip = make_images(5, 3, 8, 9), HorizontalFlip(p=0.5)
    draw = {"chosen": torch.tensor([True, False, True, True, False])}
    expected = [TF.hflip(image) if chosen else image for image, chosen in zip(images, draw["chosen"], strict=True)]
    assert torch.equal(flip.apply(images, draw), torch.stack(expected))
    flipped = HorizontalFlip(p=0.3).draw(10000, seeded_generator())["chosen"]
    assert flipped.float().mean() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(("height", "width", "size", "padding"), [(32, 32, 32, 4), (40, 33, 24, 0), (8, 8, 10, 2)])
def test_random_crop_equals_torchvision(height, width, size, padding):
    images, crop = make_images(40, 3, height, width), RandomCrop(size=size, padding=padding)
    draw = crop.draw(40, seeded_generator())
    room = torch.tensor([height, width]) + 2 * padding - size
    corners = (draw["position"] * (room + 1)).long().tolist()
    expected = [
        TF.crop(TF.pad(image, [padding] * 4), *corner, size, size)
        for image, corner in zip(images, corners, strict=True)
    ]
    assert torch.equal(crop.apply(images, draw), torch.stack(expected))
    drawn = (crop.draw(3000, seeded_generator(1))["position"] * (room + 1)).long()
    for axis in (0, 1):  # every position is equally likely
        counts = torch.bincount(drawn[:, axis], minlength=int(room[axis]) + 1)
        assert len(counts) == room[axis] + 1 and counts.min() > 0.6 * 3000 / len(counts)


def test_random_crop_that_does_not_fit_is_refused():
    images = make_images(2, 1, 8)
    crop = RandomCrop(size=8, padding=0)
    assert crop.apply(images, crop.draw(2, seeded_generator())) is images
    with pytest.raises(InputError, match="random crop of 9 pixels does not fit in images of 8 x 8"):
        RandomCrop(size=9, padding=0).apply(images, crop.draw(2, seeded_generator()))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (24, 40)])
def test_affine_equals_torchvision(channels, height, width):
    images = make_images(30, channels, height, width)
    affine = Affine(rotate=40, translate=0.2, scale=(0.7, 1.4), shear=20)
    draw = affine.draw(30, seeded_generator())
    expected = [
        TF.affine(
            image,
            angle=float(draw["angle"][i]),
            translate=(draw["shift"][i] * torch.tensor([width, height])).tolist(),
            scale=float(draw["scale"][i]),
            shear=[float(draw["shear"][i]), 0.0],
            interpolation=BILINEAR,
        )
        for i, image in enumerate(images)
    ]
    assert_close(affine.apply(images, draw), torch.stack(expected), 1e-3)


def test_affine_without_change_and_shifted_by_one_pixel():
    images = make_images(5, 1, 8)[2:]
    unchanged = {
        "angle": torch.zeros(3),
        "shift": torch.zeros(3, 2),
        "scale": torch.ones(3),
        "shear": torch.zeros(3),
    }
    affine = Affine(rotate=1, translate=0.1, scale=(1, 1), shear=1)
    assert_close(affine.apply(images, unchanged), images, 1e-6)
    one_pixel_right = unchanged | {"shift": torch.tensor([[1 / 8, 0.0]]).expand(3, 2)}
    shifted = affine.apply(images, one_pixel_right)
    assert_close(shifted[..., 1:], images[..., :-1], 1e-6)
    assert shifted[..., 0].abs().max() < 1e-6


def test_affine_draws_fill_their_ranges():
    draw = Affine(rotate=15, translate=0.1, scale=(0.85, 1.15), shear=10).draw(4000, seeded_generator())
    for values, low, high in (
        (draw["angle"], -15, 15),
        (draw["shift"][:, 0], -0.1, 0.1),
        (draw["shift"][:, 1], -0.1, 0.1),
        (draw["scale"], 0.85, 1.15),
        (draw["shear"], -10, 10),
    ):
        share = (values - low) / (high - low)
        assert share.min() >= 0 and share.max() <= 1 and share.min() < 0.01 and share.max() > 0.99
        assert share.mean() == pytest.approx(0.5, abs=0.02)
        assert share.std() == pytest.approx(1 / math.sqrt(12), abs=0.01)
    correlations = torch.corrcoef(torch.stack([draw["angle"], *draw["shift"].T, draw["scale"], draw["shear"]]))
    assert (correlations - torch.eye(5)).abs().max() < 0.08


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (24, 40)])
def test_rotation_and_shift_equal_those_of_scipy_with_the_border_repeated(height, width):
    images = make_images(20, 1, height, width)
    transform = RotateAndShift(rotate=30, translate=0.2)
    draw = transform.draw(20, seeded_generator())
    centre = torch.tensor([height - 1, width - 1]).double() / 2
    expected = []
    for image, angle, (right, down) in zip(images, torch.deg2rad(draw["angle"].double()), draw["shift"], strict=True):
        rows_columns = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])  # y before x
        shift = torch.tensor([down * height, right * width]).double()
        offset = centre - rows_columns @ (centre + shift)
        moved = affine_transform(image[0].double(), rows_columns.numpy(), offset.numpy(), order=1, mode="nearest")
        expected.append(torch.from_numpy(moved)[None])
    assert_close(transform.apply(images, draw), torch.stack(expected).float(), 1e-4)
    assert draw["angle"].abs().max() <= 30 and draw["shift"].abs().max() <= 0.2
    bright = torch.ones(20, 1, height, width)
    assert_close(transform.apply(bright, draw), bright, 1e-6)


@pytest.mark.parametrize(("height", "width", "size"), [(40, 56, 32), (20, 16, 32), (224, 160, 96)])
def test_resizing_equals_torchvision(height, width, size):
    images = make_images(6, 3, height, width)
    expected = TF.resize(images, [size, size], antialias=True)
    assert_close(Resize(size=size).apply(images, {}), expected, 1e-5)
    expected = TF.resize(images, round(size / 0.8), antialias=True)
    assert_close(ResizeShortSide(size=size, crop_fraction=0.8).apply(images, {}), expected, 1e-5)


def test_resize_returns_images_of_the_right_size_unchanged():
    images = make_images(6, 3, 32)
    assert Resize(size=32).apply(images, {}) is images
    assert ResizeShortSide(size=28, crop_fraction=0.875).apply(images, {}) is images


@pytest.mark.parametrize(("height", "width"), [(32, 32), (35, 40), (33, 37)])
def test_centre_crop_equals_torchvision(height, width):
    images = make_images(5, 3, height, width)
    assert torch.equal(CenterCrop(size=32).apply(images, {}), TF.center_crop(images, [32, 32]))
    with pytest.raises(InputError, match="central crop of 64 pixels"):
        CenterCrop(size=64).apply(images, {})
