"""Strong augmentation: several operations per image, drawn from one list (SCAN, Van Gansbeke et al. 2020)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.views import photometry
from deepclust.views.geometry import warp
from deepclust.views.photometry import blend, grey, mean
from deepclust.views.random_draws import change_, per_image

Bounds = tuple[float, float]


class RandomOperations:
    """`count` operations for every image, drawn with replacement from 14 and done one after the other.

    All have the same chance and draw a strength uniformly within the bounds given: degrees for `rotate`, the
    shift per pixel of the other axis for `shear`, shares of the side for `translate`, the smallest value
    inverted for `solarize`, bits (rounded down) for `posterize`, and for `enhance` the share kept of the
    original when it is mixed with its grey image, its mean, black or its smoothed self. Geometry reads the
    nearest pixel, as Pillow does.
    """

    def __init__(
        self,
        *,
        count: int,
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
            (turn, rotate),
            (shear_x, shear),
            (shear_y, shear),
            (translate_x, translate),
            (translate_y, translate),
            (photometry.solarize, solarize),
            (keep_bits, posterize),
            (colour, enhance),
            (contrast, enhance),
            (brightness, enhance),
            (sharpness, enhance),
        ]

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        operation = torch.randint(len(self.operations), (n, self.count), generator=generator)
        low, high = torch.tensor([list(bounds) for _, bounds in self.operations])[operation].unbind(-1)
        share = torch.rand(n, self.count, generator=generator)
        return {"operation": operation, "strength": low + share * (high - low)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        images = images.clone()
        for drawn, strength in zip(draw["operation"].unbind(1), draw["strength"].unbind(1), strict=True):
            for number, (operation, _) in enumerate(self.operations):
                images = change_(images, drawn == number, operation, strength)
        return images


# Every operation takes images (N, C, H, W) in [0, 1] and strengths (N,), and returns images.


def identity(images: Tensor, strength: Tensor) -> Tensor:
    """The images as they are."""
    return images


def auto_contrast(images: Tensor, strength: Tensor) -> Tensor:
    """Every channel stretched to the whole of [0, 1]; a constant one stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low), images)


def equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Every channel's histogram of 256 levels made flat, with Pillow's rounding."""
    levels = (images * 255).round().long().flatten(2)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    below = counts.cumsum(2) - counts
    step = below.gather(2, levels.amax(2, keepdim=True)) // 255  # pixels per level, without the highest level's
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(2, levels), levels).reshape(images.shape) / 255


def turn(images: Tensor, degrees: Tensor) -> Tensor:
    """Turned about the centre, counter-clockwise."""
    angle = torch.deg2rad(degrees)
    inverse = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    return warp(images, inverse.reshape(-1, 2, 2), images.new_zeros(len(images), 2), mode="nearest")


def shear_x(images: Tensor, slope: Tensor) -> Tensor:
    """Row y moved to the left by slope * y, so that the upper edge stays."""
    inverse = torch.eye(2, device=images.device).repeat(len(images), 1, 1)
    inverse[:, 0, 1] = slope
    height, width = images.shape[-2:]
    # warp shears about the centre, which moves the upper edge to the right by slope * height / 2
    shift = torch.stack([-slope * height / (2 * width), torch.zeros_like(slope)], 1)
    return warp(images, inverse, shift, mode="nearest")


def shear_y(images: Tensor, slope: Tensor) -> Tensor:
    """Column x moved up by slope * x, so that the left edge stays."""
    return shear_x(images.mT, slope).mT


def translate_x(images: Tensor, share: Tensor) -> Tensor:
    """Moved to the left by a share of the width."""
    shift = torch.stack([-share, torch.zeros_like(share)], 1)
    inverse = torch.eye(2, device=images.device).repeat(len(images), 1, 1)
    return warp(images, inverse, shift, mode="nearest")


def translate_y(images: Tensor, share: Tensor) -> Tensor:
    """Moved up by a share of the height."""
    return translate_x(images.mT, share).mT


def keep_bits(images: Tensor, bits: Tensor) -> Tensor:
    """Only the highest bits of every value, their number rounded down, of eight."""
    levels, step = (images * 255).round(), per_image(2 ** (8 - bits.floor())).round()  # a GPU's may be inexact
    return (levels - levels % step) / 255


def colour(images: Tensor, share: Tensor) -> Tensor:
    """A share of the image, the rest its grey image."""
    return blend(images, grey(images), share)


def contrast(images: Tensor, share: Tensor) -> Tensor:
    """A share of the image, the rest its mean grey value."""
    return blend(images, mean(grey(images)), share)


def brightness(images: Tensor, share: Tensor) -> Tensor:
    """A share of the image, the rest black."""
    return blend(images, torch.zeros_like(images), share)


def sharpness(images: Tensor, share: Tensor) -> Tensor:
    """A share of the image, the rest the image smoothed over 3 x 3 pixels, its border excepted."""
    channels = images.shape[1]
    weight = images.new_full((channels, 1, 3, 3), 1 / 13)
    weight[..., 1, 1].fill_(5 / 13)
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(images, weight, groups=channels)
    return blend(images, smooth, share)
