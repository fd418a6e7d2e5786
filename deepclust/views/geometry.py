"""Geometric transforms of batches of images: crops, resizing, flips and affine maps."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.errors import InputError
from deepclust.number_types import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFraction,
    PositiveInt,
    PositiveInterval,
)
from deepclust.views.random_draws import apply_to_chosen, draw_bernoulli, draw_uniform, make_constants
from deepclust.views.separable_filters import apply_separable, cropping_matrices, resampling_matrices
from deepclust.views.whole_images import WholeImages


class RandomResizedCrop:
    """A random box of every image, resized to `size` x `size` pixels (Szegedy et al. 2015, section 6).

    Args:
        size: side of the result in pixels.
        scale: range of the share of the image's area that the box covers.
        ratio: range of the width / height of the box, drawn on a logarithmic scale.
    """

    tries_per_image = 10  # if none of these boxes fits, the largest central one of an allowed ratio is taken

    def __init__(self, *, size: PositiveInt, scale: PositiveInterval, ratio: PositiveInterval) -> None:
        self.size, self.scale, self.ratio = size, scale, ratio

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        logarithms = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        return {
            "area": draw_uniform((n, self.tries_per_image), self.scale, generator),
            "ratio": draw_uniform((n, self.tries_per_image), logarithms, generator).exp(),
            "position": torch.rand(n, 2, generator=generator),
        }

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        height, width = images.shape[-2:]
        top, left, rows, columns = self.boxes(draw, height, width).unbind(1)
        vertical = resampling_matrices(top, rows, height, self.size)
        return apply_separable(images, vertical, resampling_matrices(left, columns, width, self.size))

    def apply_to_whole(self, images: WholeImages, draw: dict[str, Tensor]) -> Tensor:
        check_not_resized(images, self)
        return images.cut_resized(self.boxes_in(draw, images.shapes), self.size)

    def boxes(self, draw: dict[str, Tensor], height: int, width: int) -> Tensor:
        """Return top, left, height and width (N, 4) of the boxes in images of that size, in whole pixels."""
        return self.boxes_in(draw, make_constants([height, width], draw["area"].device)[None])

    def boxes_in(self, draw: dict[str, Tensor], image_shapes: Tensor) -> Tensor:
        """Return top, left, height and width (N, 4) of the boxes in images of these shapes (N, 2) or (1, 2)."""
        area = draw["area"] * image_shapes.prod(1, keepdim=True)  # pixels
        shapes = torch.stack([(area / draw["ratio"]).sqrt(), (area * draw["ratio"]).sqrt()], 2).round()
        fits = ((shapes > 0) & (shapes <= image_shapes[:, None])).all(2)
        shape = shapes[torch.arange(len(shapes), device=area.device), fits.int().argmax(1)]
        height, width = image_shapes.unbind(1)
        ratio = (width / height).clamp(*self.ratio)
        largest = torch.stack([(width / ratio).round(), (height * ratio).round()], 1).minimum(image_shapes)
        any_fits = fits.any(1, keepdim=True)
        shape = torch.where(any_fits, shape, largest)
        room = image_shapes - shape
        corner = torch.where(any_fits, (draw["position"] * (room + 1)).floor(), room // 2)
        return torch.cat([corner, shape], 1)


class RandomCrop:
    """A random box of `size` x `size` pixels of every image, which is first padded with `padding` black pixels."""

    def __init__(self, *, size: PositiveInt, padding: NonNegativeInt) -> None:
        self.size, self.padding = size, padding

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"position": torch.rand(n, 2, generator=generator)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        height, width = images.shape[-2:]
        room = [side + 2 * self.padding - self.size for side in (height, width)]
        self._check_room(min(room), height, width)
        if max(room) == 0 and self.padding == 0:
            return images
        num_positions = make_constants(room, images.device) + 1
        top, left = ((draw["position"] * num_positions).floor() - self.padding).unbind(1)
        vertical = cropping_matrices(top, height, self.size)
        return apply_separable(images, vertical, cropping_matrices(left, width, self.size))

    def apply_to_whole(self, images: WholeImages, draw: dict[str, Tensor]) -> Tensor:
        room = images.resized_shapes + (2 * self.padding - self.size)
        if room.is_cpu and len(room):
            smallest = int(room.amin(1).argmin())
            self._check_room(int(room[smallest].min()), *map(int, images.resized_shapes[smallest]))
        return images.cut((draw["position"] * (room + 1)).floor() - self.padding, self.size)

    def _check_room(self, room: int, height: int, width: int) -> None:
        if room < 0:
            raise InputError(
                f"a random crop of {self.size} pixels does not fit in images of {height} x {width}",
                expected=f"at most {min(height, width) + 2 * self.padding} pixels with this padding",
                do="lower size or raise padding of RandomCrop in the views",
            )


class HorizontalFlip:
    """The mirror image, left and right exchanged, with probability `p`."""

    def __init__(self, *, p: Fraction) -> None:
        self.p = p

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"chosen": draw_bernoulli(n, self.p, generator)}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return apply_to_chosen(images, draw["chosen"], lambda rows: rows.flip(-1))

    def apply_to_whole(self, images: WholeImages, draw: dict[str, Tensor]) -> WholeImages:
        return images.mirror(draw["chosen"])


class Affine:
    """Every image rotated, shifted, scaled and sheared about its centre; bilinear, black outside the image.

    All parameters are drawn uniformly.

    Args:
        rotate: largest angle to either side, in degrees.
        translate: largest shift along each axis, as a share of the side.
        scale: range of the scaling factor.
        shear: largest horizontal shear to either side, in degrees.
    """

    def __init__(
        self, *, rotate: NonNegativeFloat, translate: Fraction, scale: PositiveInterval, shear: NonNegativeFloat
    ) -> None:
        self.rotate, self.translate, self.scale, self.shear = rotate, translate, scale, shear

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "angle": draw_uniform((n,), (-self.rotate, self.rotate), generator),
            "shift": draw_uniform((n, 2), (-self.translate, self.translate), generator),
            "scale": draw_uniform((n,), self.scale, generator),
            "shear": draw_uniform((n,), (-self.shear, self.shear), generator),
        }

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        angle, slope = torch.deg2rad(draw["angle"]), torch.deg2rad(draw["shear"]).tan()
        cos, sin = angle.cos(), angle.sin()
        # The inverse of scale * rotation @ [[1, -slope], [0, 1]], with y downwards.
        inverse = torch.stack([cos - slope * sin, sin + slope * cos, -sin, cos], 1) / draw["scale"][:, None]
        return warp(images, inverse.reshape(-1, 2, 2), draw["shift"], mode="bilinear")


class RotateAndShift:
    """Every image rotated about its centre and shifted; bilinear, with the pixels of the border repeated outside of it.

    All parameters are drawn uniformly.

    Args:
        rotate: largest angle to either side, in degrees.
        translate: largest shift along each axis, as a share of the side.
    """

    def __init__(self, *, rotate: NonNegativeFloat, translate: Fraction) -> None:
        self.rotate, self.translate = rotate, translate

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "angle": draw_uniform((n,), (-self.rotate, self.rotate), generator),
            "shift": draw_uniform((n, 2), (-self.translate, self.translate), generator),
        }

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        angle = torch.deg2rad(draw["angle"])
        cos, sin = angle.cos(), angle.sin()
        inverse = torch.stack([cos, sin, -sin, cos], 1).reshape(-1, 2, 2)
        return warp(images, inverse, draw["shift"], mode="bilinear", outside="border")


class Resize:
    """The whole image resized to `size` x `size` pixels, whatever its shape; bilinear with antialiasing."""

    def __init__(self, *, size: PositiveInt) -> None:
        self.size = size

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        return resize(images, self.size, self.size)

    def apply_to_whole(self, images: WholeImages, draw: dict[str, Tensor]) -> Tensor:
        check_not_resized(images, self)
        return images.cut_resized(torch.cat([torch.zeros_like(images.shapes), images.shapes], 1), self.size)


class ResizeShortSide:
    """The image resized so that `size` pixels are the share `crop_fraction` of its short side; its proportions stay."""

    def __init__(self, *, size: PositiveInt, crop_fraction: PositiveFraction) -> None:
        self.short_side = round(size / crop_fraction)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        height, width = images.shape[-2:]
        long_side = int(self.short_side * max(height, width) / min(height, width))
        shape = (long_side, self.short_side) if height > width else (self.short_side, long_side)
        return resize(images, *shape)

    def apply_to_whole(self, images: WholeImages, draw: dict[str, Tensor]) -> WholeImages:
        shapes = images.resized_shapes
        short = shapes.amin(1, keepdim=True)
        return images.resize(torch.div(self.short_side * shapes, short, rounding_mode="floor"))


class CenterCrop:
    """The central `size` x `size` pixels."""

    def __init__(self, *, size: PositiveInt) -> None:
        self.size = size

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def apply(self, images: Tensor, draw: dict[str, Tensor]) -> Tensor:
        height, width = map(int, images.shape[-2:])  # numbers, not tensors, also while `deepclust export` traces this
        self._check_room(height, width)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return images[..., top : top + self.size, left : left + self.size]

    def apply_to_whole(self, images: WholeImages, draw: dict[str, Tensor]) -> Tensor:
        shapes = images.resized_shapes
        if shapes.is_cpu and len(shapes):
            self._check_room(*map(int, shapes[shapes.amin(1).argmin()]))
        return images.cut(((shapes - self.size) / 2).round(), self.size)

    def _check_room(self, height: int, width: int) -> None:
        if min(height, width) < self.size:
            raise InputError(
                f"a central crop of {self.size} pixels does not fit in images of {height} x {width}",
                expected=f"at most {min(height, width)} pixels",
                do="lower size of CenterCrop in the views or put a Resize before it",
            )


def check_not_resized(images: WholeImages, transform: object) -> None:
    """Refuse a second resampling of images in their own shapes.

    Raises:
        InputError: if they have been resized before.
    """
    if images.is_resized:
        raise InputError(
            f"{type(transform).__name__} comes after ResizeShortSide, on images in their own shapes",
            expected="one of the two: the images cannot be resampled twice",
            do="take ResizeShortSide out of that pipeline in the views, and set dataset.stored_size to its size",
        )


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Return images (N, C, height, width), bilinear with antialiasing; the images themselves if the size is right."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def warp(images: Tensor, inverse: Tensor, shift: Tensor, *, mode: str, outside: str = "zeros") -> Tensor:
    """Return images (N, C, H, W), each under an affine map of its own.

    Args:
        images: (N, C, H, W).
        inverse: (N, 2, 2) maps a position in the new image to its source; (x, y) in pixels from the centre.
        shift: (N, 2) shares of the width and of the height by which the image moves to the right and down.
        mode: "bilinear" or "nearest".
        outside: what lies outside the image: "zeros" is black, "border" repeats the pixels of the border.
    """
    height, width = images.shape[-2:]
    # affine_grid counts from -1 to 1 along both axes.
    linear = inverse * make_constants([1.0, height / width, width / height, 1.0], images.device).reshape(2, 2)
    theta = torch.cat([linear, linear @ (-2 * shift[:, :, None])], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode=outside, align_corners=False)
