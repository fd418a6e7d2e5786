"""Photometric transforms against functions of torchvision or Pillow for one image, given the same draw."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import ImageFilter, ImageOps

from deepclust.views.photometry import (
    ColorJitter,
    Cutout,
    GaussianBlur,
    Grayscale,
    Intensity,
    PillowBlur,
    Solarize,
    adjust_hue,
)
from tests.views.conftest import assert_close, make_images, seeded_generator

ADJUST = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}


def jitter_one_image(image, order, strength):
    for kind in order.tolist():
        image = ADJUST[kind](image, float(strength[kind]))
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 32])
def test_colour_jitter_equals_torchvision_in_every_order(channels, size):
    n = 96
    images, jitter = make_images(n, channels, size), ColorJitter(**JITTER, p=0.8)
    draw = jitter.draw(n, seeded_generator())
    draw["order"] = torch.tensor(list(itertools.permutations(range(4))) * 4)
    expected = [
        jitter_one_image(image, order, strength) if chosen else image
        for image, chosen, order, strength in zip(images, *draw.values(), strict=True)
    ]
    assert_close(jitter.apply(images, draw), torch.stack(expected))


def test_colour_jitter_on_edge_cases_at_full_strength():
    images = make_images(5, 3, 8).repeat(16, 1, 1, 1)
    jitter = ColorJitter(brightness=1.5, contrast=1.5, saturation=1.5, hue=0.5, p=1)
    draw = jitter.draw(80, seeded_generator())
    draw["strength"][:40, :3] = torch.tensor([0.0, 2.5]).repeat_interleave(20)[:, None]
    expected = [jitter_one_image(*arguments) for arguments in zip(images, draw["order"], draw["strength"], strict=True)]
    assert_close(jitter.apply(images, draw), torch.stack(expected))


def test_distribution_of_colour_jitter_draws():
    n = 24000
    draw = ColorJitter(brightness=0.4, contrast=1.2, saturation=0.2, hue=0.1, p=0.8).draw(n, seeded_generator())
    assert draw["chosen"].float().mean() == pytest.approx(0.8, abs=0.01)
    orders, counts = draw["order"].unique(dim=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 850 and counts.max() < 1150  # 1000 each
    for values, (low, high) in zip(draw["strength"].T, [(0.6, 1.4), (0.0, 2.2), (0.8, 1.2), (-0.1, 0.1)], strict=True):
        assert values.min() >= low - 1e-6 and values.max() <= high + 1e-6
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert values.std() == pytest.approx((high - low) / 12**0.5, rel=0.02)
    correlations = torch.corrcoef(torch.stack([*draw["strength"].T, draw["chosen"].float()]))
    neighbours = torch.corrcoef(torch.stack([draw["strength"][:-1, 0], draw["strength"][1:, 0]]))
    assert (correlations - torch.eye(5)).abs().max() < 0.03 and neighbours[0, 1].abs() < 0.03


def test_hue_equals_torchvision_over_the_whole_colour_cube():
    levels = torch.tensor([0, 1, 64, 128, 254, 255]) / 255
    cube = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 12, 18)
    turns = torch.linspace(-0.5, 0.5, 13)
    expected = torch.stack([TF.adjust_hue(cube, float(turn)) for turn in turns])
    assert_close(adjust_hue(cube.expand(13, 3, 12, 18), turns), expected, 1e-4)


def test_greyscale_equals_torchvision():
    images, operation = make_images(40, 3, 32), Grayscale(p=0.5)
    draw = operation.draw(40, seeded_generator())
    expected = [
        TF.rgb_to_grayscale(image, 3) if chosen else image for image, chosen in zip(images, draw["chosen"], strict=True)
    ]
    actual = operation.apply(images, draw)
    assert_close(actual, torch.stack(expected))
    assert torch.equal(actual[~draw["chosen"]], images[~draw["chosen"]])
    one_channel = make_images(10, 1, 8)
    assert torch.equal(operation.apply(one_channel, operation.draw(10, seeded_generator())), one_channel)
    assert operation.draw(10000, seeded_generator())["chosen"].float().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 40)])
def test_gaussian_blur_equals_torchvision(channels, height, width):
    images, blur = (
        make_images(30, channels, height, width),
        GaussianBlur(p=0.5, kernel_size=23, sigma=(0.1, 2.0)),
    )
    draw = blur.draw(30, seeded_generator())
    expected = [
        TF.gaussian_blur(image, [23, 23], [float(sigma)] * 2) if chosen else image
        for image, chosen, sigma in zip(images, draw["chosen"], draw["sigma"], strict=True)
    ]
    assert_close(blur.apply(images, draw), torch.stack(expected), 1e-5)
    sigma = blur.draw(5000, seeded_generator(1))["sigma"]
    assert sigma.min() >= 0.1 and sigma.max() <= 2 and sigma.mean() == pytest.approx(1.05, abs=0.03)


def test_gaussian_blur_wider_than_the_image_mirrors_it():
    image, blur = make_images(6, 1, 8)[5:], GaussianBlur(p=1, kernel_size=23, sigma=(1.5, 1.5))
    kernel = np.exp(-0.5 * (np.arange(-11, 12) / 1.5) ** 2)
    kernel /= kernel.sum()
    expected = np.pad(image[0, 0].numpy(), 11, mode="reflect")
    for axis in (0, 1):
        expected = np.apply_along_axis(np.convolve, axis, expected, kernel, mode="valid")
    actual = blur.apply(image, blur.draw(1, seeded_generator()))
    assert np.abs(actual[0, 0].numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("sigma", [0.1, 0.4, 0.9, 1.3, 2.0])
@pytest.mark.parametrize("size", [8, 32])
def test_pillow_blur_equals_pillow(sigma, size):
    images, blur = make_images(10, 3, size), PillowBlur(p=1, sigma=(0.1, 2.0))
    draw = {"chosen": torch.ones(10, dtype=torch.bool), "sigma": torch.full((10,), sigma)}
    expected = [TF.to_tensor(TF.to_pil_image(image).filter(ImageFilter.GaussianBlur(sigma))) for image in images]
    assert_close(blur.apply(images, draw), torch.stack(expected), 2.01 / 255)
    drawn = PillowBlur(p=0.1, sigma=(0.1, 2.0)).draw(5000, seeded_generator())
    assert drawn["chosen"].float().mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_solarize_equals_pillow(channels):
    images, operation = make_images(30, channels, 32), Solarize(p=0.5, threshold=0.50196)
    draw = operation.draw(30, seeded_generator())
    expected = [
        TF.to_tensor(ImageOps.solarize(TF.to_pil_image(image), 128)) if chosen else image
        for image, chosen in zip(images, draw["chosen"], strict=True)
    ]
    assert_close(operation.apply(images, draw), torch.stack(expected), 1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28])
def test_intensity_equals_its_steps_on_one_image(channels, size):
    images = make_images(30, channels, size)
    operation = Intensity(brightness=0.3, contrast=0.4, gamma=0.5, noise=0.1, size=size)
    draw = operation.draw(30, seeded_generator())
    expected = []
    for i, image in enumerate(images):
        changed = TF.adjust_gamma(image, float(draw["gamma"][i]))
        changed = TF.adjust_contrast(changed, float(draw["contrast"][i]))
        expected.append((changed * draw["brightness"][i] + draw["noise"][i]).clamp(0, 1))
    assert_close(operation.apply(images, draw), torch.stack(expected))


def test_distribution_of_intensity_draws():
    draw = Intensity(brightness=0.3, contrast=0.4, gamma=0.5, noise=0.1, size=8).draw(5000, seeded_generator())
    assert draw["brightness"].min() >= 0.7 and draw["brightness"].max() <= 1.3
    assert draw["contrast"].min() >= 0.6 and draw["contrast"].max() <= 1.4
    logarithm = draw["gamma"].log()
    assert logarithm.abs().max() <= 0.5 + 1e-6 and logarithm.mean().abs() < 0.02
    deviation = draw["noise"].flatten(1).std(1)  # of an image: uniform in (0, 0.1)
    assert deviation.mean() == pytest.approx(0.05, abs=0.002) and deviation.max() < 0.13
    assert draw["noise"].mean().abs() < 1e-3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 20)])
def test_cutout_equals_a_loop_over_pixels(channels, height, width):
    n, fill = 40, [0.25, 0.5, 0.75][:channels]
    images, cutout = make_images(n, channels, height, width), Cutout(p=0.9, max_side=0.5, even_sides=False, fill=fill)
    draw = cutout.draw(n, seeded_generator())
    expected = images.clone()
    for i in draw["chosen"].nonzero().flatten().tolist():
        side = 1 + int(draw["side"][i] * height // 2)
        top = int(draw["centre"][i, 0] * height) - side // 2
        left = int(draw["centre"][i, 1] * width) - side // 2
        for y in range(max(top, 0), min(top + side, height)):
            for x in range(max(left, 0), min(left + side, width)):
                expected[i, :, y, x] = torch.tensor(fill)
    assert torch.equal(cutout.apply(images, draw), expected)


def test_even_sides_of_cutout_are_those_of_scan():
    """Its code erases from length // 2 before the centre to length // 2 behind it, of a length from 1 on."""
    n, size = 4000, 16
    images = torch.ones(n, 1, size, size)
    odd, even = (Cutout(p=1, max_side=0.5, even_sides=value, fill=None) for value in (False, True))
    draw = odd.draw(n, seeded_generator())
    draw["centre"][:] = 0.5
    sides, even_sides = ((1 - c.apply(images, draw)).flatten(1).sum(1).sqrt() for c in (odd, even))
    assert torch.equal(even_sides, 2 * (sides / 2).floor())
    erased = 1 - even.apply(images, draw)[sides.argmax()][0]
    assert erased.nonzero().unique().tolist() == list(range(size // 2 - 4, size // 2 + 4))


def test_cutout_has_uniform_sides_and_is_black_without_a_fill():
    n, cutout = 8000, Cutout(p=1, max_side=0.5, even_sides=False, fill=None)
    draw = cutout.draw(n, seeded_generator())
    draw["centre"][:] = 0.5
    holes = 1 - cutout.apply(torch.ones(n, 1, 16, 16), draw)
    sides = holes.flatten(1).sum(1).sqrt()
    assert sides.unique().tolist() == list(range(1, 9))
    assert torch.bincount(sides.long())[1:].min() > 850  # 1000 each
