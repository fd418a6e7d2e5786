"""Strong augmentation: several operations for each image, drawn from one list (SCAN, Van Gansbeke et al. 2020)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.number_types import NonNegativeInt
from deepclust.views import photometry
from deepclust.views.geometry import warp
from deepclust.views.photometry import blend, mean_over_pixels, to_grey
from deepclust.views.random_draws import add_pixel_dimensions, apply_to_chosen_

Bounds = tuple[float, float]


class RandomOperations:
    """`count` operations for every image, drawn with replacement from 14 and applied one after the other.

    All operations have the same probability. The strength of each is drawn uniformly between the bounds given for it.
    Geometric operations read the nearest pixel, as Pillow does.

    Args:
        count: operations per image.
        rotate: angle in degrees, counter-clockwise.
        shear: shift per pixel of the other axis.
        translate: shift as a share of the side.
        solarize: smallest value that is inverted.
        posterize: bits that are kept, rounded down.
        enhance: share of the original when it is blended with its greyscale, its mean, black or its smoothed version.
    """

    def __init__(
        self,
        *,
        count: NonNegativeInt,
        rotate: Bounds,
        shear: Bounds,
        translate: Bounds,
        solarize: Bounds,
        posterize: Bounds,
        enhance: Bounds,
    ) -> None:
        self.count = count
        self.operations: list[tuple[Callable[[Tensor, Tensor], Tensor], Bounds]] = [
            (identity, (0, 0)),
            (auto_contrast, (0, 0)),
            (equalize, (0, 0)),
            (rotate_images, rotate),
            (shear_x, shear),
            (shear_y, shear),
            (translate_x, translate),
            (translate_y, translate),
            (photometry.solarize, solarize),
            (posterize_images, posterize),
            (adjust_saturation, enhance),
            (adjust_contrast, enhance),
            (adjust_brightness, enhance),
            (adjust_sharpness, enhance),
        ]

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        operation = torch.randint(len(self.operations), (n, self.count), generator=generator)
        low, high = torch.tensor([list(bounds) for _, bounds in self.operations])[operation].unbind(-1)
        fraction = torch.rand(n, self.count, generator=generator)
        return {"operation": operation, "strength": low + fraction * (high - low)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        images = images.clone()
        for drawn_numbers, strength in zip(draw["operation"].unbind(1), draw["strength"].unbind(1), strict=True):
            for number, (operation, _) in enumerate(self.operations):
                images = apply_to_chosen_(images, drawn_numbers == number, operation, strength)
        return images


# Every operation takes images (N, C, H, W) in [0, 1] and strengths (N,), and returns images.


def identity(images: Tensor, strength: Tensor) -> Tensor:
    """Return the images as they are."""
    return images


def auto_contrast(images: Tensor, strength: Tensor) -> Tensor:
    """Stretch every channel to the whole of [0, 1]; constant channels stay."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low), images)


def equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Flatten the histogram of 256 levels of every channel, with Pillow's rounding."""
    levels = (images * 255).round().long().flatten(2)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    below = counts.cumsum(2) - counts
    step = below.gather(2, levels.amax(2, keepdim=True)) // 255  # pixels per level, without the highest level's
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(2, levels), levels).reshape(images.shape) / 255


def rotate_images(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate counter-clockwise about the centre."""
    angle = torch.deg2rad(degrees)
    inverse = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    return warp(images, inverse.reshape(-1, 2, 2), images.new_zeros(len(images), 2), mode="nearest")


def shear_x(images: Tensor, slope: Tensor) -> Tensor:
    """Shift row y to the left by slope * y, so that the upper edge stays."""
    inverse = torch.eye(2, device=images.device).repeat(len(images), 1, 1)
    inverse[:, 0, 1] = slope
    height, width = images.shape[-2:]
    # warp shears about the centre, which moves the upper edge to the right by slope * height / 2.
    shift = torch.stack([-slope * height / (2 * width), torch.zeros_like(slope)], 1)
    return warp(images, inverse, shift, mode="nearest")


def shear_y(images: Tensor, slope: Tensor) -> Tensor:
    """Shift column x up by slope * x, so that the left edge stays."""
    return shear_x(images.mT, slope).mT


def translate_x(images: Tensor, share: Tensor) -> Tensor:
    """Shift to the left by a share of the width."""
    shift = torch.stack([-share, torch.zeros_like(share)], 1)
    inverse = torch.eye(2, device=images.device).repeat(len(images), 1, 1)
    return warp(images, inverse, shift, mode="nearest")


def translate_y(images: Tensor, share: Tensor) -> Tensor:
    """Shift up by a share of the height."""
    return translate_x(images.mT, share).mT


def posterize_images(images: Tensor, bits: Tensor) -> Tensor:
    """Keep only the highest `bits` (N,), rounded down, of the eight bits of every value."""
    levels = (images * 255).round()
    step = add_pixel_dimensions(2 ** (8 - bits.floor())).round()  # a power may be inexact on a GPU
    return (levels - levels % step) / 255


def adjust_saturation(images: Tensor, share: Tensor) -> Tensor:
    """Blend a share of the image with its greyscale."""
    return blend(images, to_grey(images), share)


def adjust_contrast(images: Tensor, share: Tensor) -> Tensor:
    """Blend a share of the image with its mean grey value."""
    return blend(images, mean_over_pixels(to_grey(images)), share)


def adjust_brightness(images: Tensor, share: Tensor) -> Tensor:
    """Blend a share of the image with black."""
    return blend(images, torch.zeros_like(images), share)


def adjust_sharpness(images: Tensor, share: Tensor) -> Tensor:
    """Blend a share of the image with the image smoothed over 3 x 3 pixels, except at its border."""
    channels = images.shape[1]
    weight = images.new_full((channels, 1, 3, 3), 1 / 13)
    weight[..., 1, 1].fill_(5 / 13)
    smoothed = images.clone()
    smoothed[..., 1:-1, 1:-1] = F.conv2d(images, weight, groups=channels)
    return blend(images, smoothed, share)
