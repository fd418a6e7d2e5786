"""Photometric transforms of batches of images: colour, greyscale, blur, solarising, intensity, erased squares."""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from deepclust.number_types import (
    FiniteFloat,
    Fraction,
    NonNegativeFloat,
    PositiveInt,
    PositiveInterval,
)
from deepclust.views.random_draws import (
    add_pixel_dimensions,
    apply_to_chosen,
    apply_to_chosen_,
    draw_bernoulli,
    draw_uniform,
    make_constants,
)
from deepclust.views.separable_filters import apply_separable, box_kernels, filtering_matrices, gaussian_kernels

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class ColorJitter:
    """With probability `p`, brightness, contrast, saturation and hue changed in an order drawn for each image.

    The first three are changed by a factor from 1 - x to 1 + x (not below 0), where x is the argument of that name. The
    hue is shifted by up to `hue` turns of the colour circle to either side. Images of one channel have neither
    saturation nor hue; these two changes leave them as they are.
    """

    def __init__(
        self,
        *,
        brightness: NonNegativeFloat,
        contrast: NonNegativeFloat,
        saturation: NonNegativeFloat,
        hue: Annotated[float, Ge(0), Le(0.5)],
        p: Fraction,
    ) -> None:
        factors = [(max(0.0, 1 - x), 1 + x) for x in (brightness, contrast, saturation)]
        self.bounds, self.p = [*factors, (-hue, hue)], p

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "chosen": draw_bernoulli(n, self.p, generator),
            "order": torch.rand(n, 4, generator=generator).argsort(1),
            "strength": torch.stack([draw_uniform((n,), bounds, generator) for bounds in self.bounds], 1),
        }

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return apply_to_chosen(images, draw["chosen"], self.jitter, draw["order"], draw["strength"])

    def jitter(self, images: Tensor, order: Tensor, strength: Tensor) -> Tensor:
        """Return images (N, C, H, W) changed in `order` (N, 4), with a strength (N, 4) for each of the four changes."""
        strength = strength.gather(1, order)
        # One formula blends an image with black, its mean or its greyscale. On a hue step it leaves the image as it is.
        image_weights = strength.masked_fill(order == HUE, 1)
        rest = 1 - image_weights
        weights = torch.stack([image_weights, rest * (order == CONTRAST), rest * (order == SATURATION)])
        for step in range(4):
            image_weight, mean_weight, grey_weight = weights[:, :, step, None, None, None]
            grey = to_grey(images)
            other = (grey_weight * grey).add_(mean_weight * mean_over_pixels(grey))
            images = torch.mul(images, image_weight, out=images if step else None).add_(other).clamp_(0, 1)
            if images.shape[1] == 3:
                images = apply_to_chosen_(images, order[:, step] == HUE, adjust_hue, strength[:, step])
        return images


class Grayscale:
    """With probability `p`, the greyscale of the image in all channels."""

    def __init__(self, *, p: Fraction) -> None:
        self.p = p

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"chosen": draw_bernoulli(n, self.p, generator)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return apply_to_chosen(images, draw["chosen"], lambda rows: to_grey(rows).expand_as(rows))


class GaussianBlur:
    """With probability `p`, a Gaussian filter of `kernel_size` pixels; its deviation is drawn from `sigma` (pixels)."""

    def __init__(self, *, p: Fraction, kernel_size: PositiveInt, sigma: PositiveInterval) -> None:
        self.p, self.kernel_size, self.sigma = p, kernel_size, sigma

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"chosen": draw_bernoulli(n, self.p, generator), "sigma": draw_uniform((n,), self.sigma, generator)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return apply_to_chosen(images, draw["chosen"], self.blur, draw["sigma"])

    def blur(self, images: Tensor, sigma: Tensor) -> Tensor:
        """Return images (N, C, H, W) blurred with deviations `sigma` (N,), mirrored at the border."""
        kernels = gaussian_kernels(sigma, self.kernel_size)
        vertical, horizontal = (filtering_matrices(kernels, pixels, mirror=True) for pixels in images.shape[-2:])
        return apply_separable(images, vertical, horizontal)


class PillowBlur:
    """With probability `p`, Pillow's Gaussian blur; its deviation is drawn from `sigma` (pixels).

    Pillow applies three box filters along each axis and rounds to 8 bits after each. With deviations below about 0.5,
    the result is far from that of a sampled Gaussian.
    """

    def __init__(self, *, p: Fraction, sigma: PositiveInterval) -> None:
        self.p, self.sigma = p, sigma

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"chosen": draw_bernoulli(n, self.p, generator), "sigma": draw_uniform((n,), self.sigma, generator)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return apply_to_chosen(images, draw["chosen"], self.blur, draw["sigma"])

    def blur(self, images: Tensor, sigma: Tensor) -> Tensor:
        """Return images (N, C, H, W) blurred with deviations `sigma` (N,), the last pixel repeated at the border."""
        # Each pass gives a third of the variance: a box over an odd number of pixels and a fraction of the next two.
        variance = sigma**2 / 3
        whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
        fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
        kernels = box_kernels(whole + fraction, 2 * int(self.sigma[1] + 2) + 1)
        vertical, horizontal = (
            filtering_matrices(kernels, pixels, mirror=False)[:, None] for pixels in images.shape[-2:]
        )
        levels = (images * 255).round()
        for _ in range(3):
            levels = (levels @ horizontal.mT).round()
        for _ in range(3):
            levels = (vertical @ levels).round()
        return levels / 255


class Solarize:
    """With probability `p`, values of at least `threshold` inverted to 1 - value."""

    def __init__(self, *, p: Fraction, threshold: FiniteFloat) -> None:
        self.p, self.threshold = p, threshold

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"chosen": draw_bernoulli(n, self.p, generator)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return apply_to_chosen(images, draw["chosen"], solarize, images.new_full((len(images),), self.threshold))


class Intensity:
    """Grey values changed as pens, papers and scanners change them: gamma, contrast, brightness, then noise.

    Gamma is drawn from exp(-`gamma`) to exp(`gamma`). Contrast (about the mean) and brightness are changed by factors
    from 1 - x to 1 + x, where x is the argument of that name. The noise is normal; its deviation is drawn from 0 to
    `noise`. `size` is the side of the square images in pixels.
    """

    def __init__(
        self,
        *,
        brightness: NonNegativeFloat,
        contrast: NonNegativeFloat,
        gamma: NonNegativeFloat,
        noise: NonNegativeFloat,
        size: PositiveInt,
    ) -> None:
        self.brightness, self.contrast, self.gamma = brightness, contrast, gamma
        self.noise, self.size = noise, size

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        noise = torch.randn(n, 1, self.size, self.size, generator=generator)
        return {
            "gamma": draw_uniform((n,), (-self.gamma, self.gamma), generator).exp(),
            "contrast": draw_uniform((n,), (1 - self.contrast, 1 + self.contrast), generator),
            "brightness": draw_uniform((n,), (1 - self.brightness, 1 + self.brightness), generator),
            "noise": noise * draw_uniform((n, 1, 1, 1), (0, self.noise), generator),
        }

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        images = images.clamp(0, 1) ** add_pixel_dimensions(draw["gamma"])
        images = blend(images, mean_over_pixels(to_grey(images)), draw["contrast"])
        images = images * add_pixel_dimensions(draw["brightness"])
        return (images + draw["noise"]).clamp(0, 1)


class Cutout:
    """With probability `p`, a square set to `fill` (DeVries and Taylor 2017).

    The side of the square is drawn from 1 pixel to `max_side` (share of the height). With `even_sides` an odd side is
    one pixel shorter, as in SCAN's code, so that a side of 1 leaves the image as it is. The centre of the square is
    uniform over the image, so that part of it may lie outside. `fill` has one value per channel, in [0, 1]; None is
    black.
    """

    def __init__(
        self, *, p: Fraction, max_side: Fraction, even_sides: bool, fill: Sequence[FiniteFloat] | None
    ) -> None:
        self.p, self.max_side, self.even_sides = p, max_side, even_sides
        self.fill = [0.0] if fill is None else list(fill)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "chosen": draw_bernoulli(n, self.p, generator),
            "side": torch.rand(n, generator=generator),
            "centre": torch.rand(n, 2, generator=generator),
        }

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return apply_to_chosen(images, draw["chosen"], self.erase_squares, draw["side"], draw["centre"])

    def erase_squares(self, images: Tensor, side: Tensor, centre: Tensor) -> Tensor:
        """Return images (N, C, H, W) with one square filled in each.

        Args:
            images: (N, C, H, W).
            side: (N,) side of the square as a share of the largest side.
            centre: (N, 2) its centre as a share of height and width, in [0, 1).
        """
        height, width = images.shape[-2:]
        pixels = 1 + (side * max(1, round(self.max_side * height))).floor()
        if self.even_sides:
            pixels = 2 * (pixels / 2).floor()
        start = (centre * make_constants([height, width], images.device)).floor() - (pixels / 2).floor()[:, None]
        top, left = add_pixel_dimensions(start).split(1, dim=1)
        rows = torch.arange(height, device=images.device)[:, None] - top
        columns = torch.arange(width, device=images.device) - left
        length = add_pixel_dimensions(pixels)
        inside = (rows >= 0) & (rows < length) & (columns >= 0) & (columns < length)
        return torch.where(inside, add_pixel_dimensions(make_constants(self.fill, images.device)[None]), images)


def to_grey(images: Tensor) -> Tensor:
    """Return the luma (N, 1, H, W) of images (N, 1 or 3, H, W), weighted as in ITU-R BT.601."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def mean_over_pixels(images: Tensor) -> Tensor:
    """Return the mean (N, C, 1, 1) over the pixels of images (N, C, H, W)."""
    return images.mean((2, 3), keepdim=True)


def blend(images: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Return share * images + (1 - share) * other, with a share (N,) for each image, clamped to [0, 1]."""
    return torch.lerp(other, images, add_pixel_dimensions(share)).clamp(0, 1)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Return images (N, C, H, W) of which values of at least the threshold (N,) of their image are inverted."""
    return torch.where(images >= add_pixel_dimensions(threshold), 1 - images, images)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Return RGB images (N, 3, H, W) with the hue shifted by `turns` (N,) of the colour circle.

    The channels are sorted by swaps, as graphics shaders do it. This avoids boolean tensors, which are slow on a CPU.
    """
    red, green, blue = images.split(1, dim=1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    top, middle = torch.maximum(red, high), torch.minimum(red, high)
    chroma = top - torch.minimum(red, low)
    blue_over_green, high_over_red = greater_as_float(blue, green), greater_as_float(high, red)
    base = -6 * blue_over_green + high_over_red * (12 * blue_over_green - 2)
    hue = (base + (middle - low) / chroma.clamp(min=1e-12)).abs_()  # in sixths of the circle
    hue.add_(add_pixel_dimensions(6 * turns))
    hue.sub_((hue / 6).floor_(), alpha=6)  # the remainder; this is three times as fast as torch.remainder
    share = torch.cat([(hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 1).clamp_(0, 1)
    return share.mul_(chroma).add_(top - chroma)


def greater_as_float(first: Tensor, second: Tensor) -> Tensor:
    """Return 1.0 where `first` is greater than `second`, else 0.0, without boolean tensors, which are slow."""
    return (first - second).mul_(1e30).clamp_(0, 1)
