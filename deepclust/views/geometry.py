"""Where pixels go: crops, resizing, flips, affine maps."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.errors import InputError
from deepclust.views.random_draws import change, coin, numbers, uniform
from deepclust.views.separable_filters import resampling, separable, shifting


class RandomResizedCrop:
    """A random box of every image, resized to `size` x `size` (Szegedy et al. 2015, section 6).

    `scale`: range of the box's share of the area; `ratio`: range of its width / height, drawn on a log scale.
    """

    tries = 10  # boxes drawn per image; where none fits, the largest central one of an allowed ratio is taken

    def __init__(self, *, size: int, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
        self.size, self.scale, self.ratio = size, scale, ratio

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        logarithms = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        return {
            "area": uniform((n, self.tries), self.scale, generator),
            "ratio": uniform((n, self.tries), logarithms, generator).exp(),
            "place": torch.rand(n, 2, generator=generator),
        }

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        height, width = images.shape[-2:]
        top, left, rows, columns = self.boxes(draw, height, width).unbind(1)
        down = resampling(top, rows, height, self.size)
        return separable(images, down, resampling(left, columns, width, self.size))

    def boxes(self, draw: dict[str, Tensor], height: int, width: int) -> Tensor:
        """Top, left, height and width (N, 4) of the boxes, in whole pixels of images of that size."""
        pixels = draw["area"] * (height * width)
        shapes = torch.stack([(pixels / draw["ratio"]).sqrt(), (pixels * draw["ratio"]).sqrt()], 2).round()
        device = pixels.device
        image = numbers([height, width], device)
        fits = ((shapes > 0) & (shapes <= image)).all(2)
        shape = shapes[torch.arange(len(shapes), device=device), fits.int().argmax(1)]
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        largest = numbers([min(height, round(width / ratio)), min(width, round(height * ratio))], device)
        some = fits.any(1, keepdim=True)
        shape = torch.where(some, shape, largest)
        corner = torch.where(some, (draw["place"] * (image - shape + 1)).floor(), (image - shape) // 2)
        return torch.cat([corner, shape], 1)


class RandomCrop:
    """A random box of `size` x `size` pixels of every image, `padding` black pixels around it included."""

    def __init__(self, *, size: int, padding: int) -> None:
        self.size, self.padding = size, padding

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"place": torch.rand(n, 2, generator=generator)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        height, width = images.shape[-2:]
        room = [side + 2 * self.padding - self.size for side in (height, width)]
        if min(room) < 0:
            raise InputError(
                f"a random crop of {self.size} pixels does not fit in images of {height} x {width}",
                expected=f"at most {min(height, width) + 2 * self.padding} pixels with this padding",
                do="lower size or raise padding of RandomCrop in the views",
            )
        if max(room) == 0 and self.padding == 0:
            return images
        places = numbers(room, images.device) + 1
        top, left = ((draw["place"] * places).floor() - self.padding).unbind(1)
        return separable(images, shifting(top, height, self.size), shifting(left, width, self.size))


class HorizontalFlip:
    """The mirror image, left for right, with probability `p`."""

    def __init__(self, *, p: float) -> None:
        self.p = p

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"chosen": coin(n, self.p, generator)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return change(images, draw["chosen"], lambda rows: rows.flip(-1))


class Affine:
    """Every image turned, moved, scaled and sheared about its centre; bilinear, black where nothing was.

    Drawn uniformly: an angle within `rotate` degrees to either side, a move within `translate` (share of the
    side) along each axis, a factor within `scale`, and a horizontal shear within `shear` degrees to either
    side.
    """

    def __init__(self, *, rotate: float, translate: float, scale: tuple[float, float], shear: float) -> None:
        self.rotate, self.translate, self.scale, self.shear = rotate, translate, scale, shear

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "angle": uniform((n,), (-self.rotate, self.rotate), generator),
            "move": uniform((n, 2), (-self.translate, self.translate), generator),
            "scale": uniform((n,), self.scale, generator),
            "shear": uniform((n,), (-self.shear, self.shear), generator),
        }

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        turn, slope = torch.deg2rad(draw["angle"]), torch.deg2rad(draw["shear"]).tan()
        cos, sin = turn.cos(), turn.sin()
        # the inverse of scale * rotation @ [[1, -slope], [0, 1]], with y downwards
        inverse = torch.stack([cos - slope * sin, sin + slope * cos, -sin, cos], 1) / draw["scale"][:, None]
        return warp(images, inverse.reshape(-1, 2, 2), draw["move"], mode="bilinear")


class Resize:
    """The whole image as `size` x `size` pixels, whatever its shape; bilinear with antialiasing."""

    def __init__(self, *, size: int) -> None:
        self.size = size

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return resize(images, self.size, self.size)


class ResizeShortSide:
    """The image scaled, shape kept, so that a central `size` is `crop_fraction` of its short side."""

    def __init__(self, *, size: int, crop_fraction: float) -> None:
        self.short_side = round(size / crop_fraction)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        height, width = images.shape[-2:]
        long_side = int(self.short_side * max(height, width) / min(height, width))
        shape = (long_side, self.short_side) if height > width else (self.short_side, long_side)
        return resize(images, *shape)


class CenterCrop:
    """The central `size` x `size` pixels."""

    def __init__(self, *, size: int) -> None:
        self.size = size

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        height, width = map(int, images.shape[-2:])  # plain numbers also where `deepclust export` traces this
        if min(height, width) < self.size:
            raise InputError(
                f"a central crop of {self.size} pixels does not fit in images of {height} x {width}",
                expected=f"at most {min(height, width)} pixels",
                do="lower size of CenterCrop in the views or put a Resize before it",
            )
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return images[..., top : top + self.size, left : left + self.size]


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Images (N, C, height, width), bilinear with antialiasing; the same ones where the size is right."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def warp(images: Tensor, inverse: Tensor, shift: Tensor, *, mode: str) -> Tensor:
    """Images (N, C, H, W) under an affine map each; black where nothing was.

    Args:
        inverse: (N, 2, 2) from a place in the new image to its source, (x, y) in pixels off the centre.
        shift: (N, 2) shares of the width and of the height by which the image moves right and down.
        mode: "bilinear" or "nearest".
    """
    height, width = images.shape[-2:]
    # affine_grid counts from -1 to 1 over either side
    linear = inverse * numbers([1.0, height / width, width / height, 1.0], images.device).reshape(2, 2)
    theta = torch.cat([linear, linear @ (-2 * shift[:, :, None])], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode="zeros", align_corners=False)
