"""Whole images of different shapes on their way to views of one size: what comes before the crop is only noted.

A pipeline begins with a few transforms such as `HorizontalFlip` and `ResizeShortSide`, up to one that gives all images
the same size, a crop or `Resize`. Of images in their own shapes, the first ones only note what is to be done. The last
one then computes every view by a single resampling, of the pixels that it shows and no others.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from deepclust.views.random_draws import add_pixel_dimensions
from deepclust.views.separable_filters import apply_separable, resampling_matrices, resized_cropping_matrices


@dataclass(frozen=True)
class WholeImages:
    """Images in their own shapes, as floats, and what is to be done with them when they are cropped.

    Shapes and boxes are those of the upright images: (height, width), and from above and from the left.
    """

    pixels: Tensor  # (N, channels, H, W), padded, and tall images on their side, as in PaddedImages
    shapes: Tensor  # (N, 2) int64, in pixels
    resized_shapes: Tensor  # (N, 2), the shapes to which the images are resized before they are cropped
    mirrored: Tensor  # (N,) boolean, whether left and right are exchanged
    is_resized: bool = False  # whether `resized_shapes` are others than `shapes`

    @classmethod
    def of(cls, pixels: Tensor, shapes: Tensor) -> "WholeImages":
        """Return images with which nothing is to be done, from the parts of PaddedImages, the pixels as floats."""
        return cls(pixels, shapes, shapes, torch.zeros_like(shapes[:, 0], dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.pixels)

    def repeat(self, times: int) -> "WholeImages":
        """Return the images `times` times over, one round after the other."""
        return WholeImages(
            self.pixels.repeat(times, 1, 1, 1),
            self.shapes.repeat(times, 1),
            self.resized_shapes.repeat(times, 1),
            self.mirrored.repeat(times),
            self.is_resized,
        )

    def mirror(self, chosen: Tensor) -> "WholeImages":
        """Return the images with left and right exchanged in the chosen ones (N,)."""
        return replace(self, mirrored=self.mirrored ^ chosen)

    def resize(self, shapes: Tensor) -> "WholeImages":
        """Return the images as of other shapes (N, 2), in whole pixels."""
        return replace(self, resized_shapes=shapes, is_resized=True)

    def cut_resized(self, boxes: Tensor, size: int) -> Tensor:
        """Return boxes (N, 4) of the images, each resized to (size, size), bilinear with antialiasing.

        A box is its top, left, height and width in pixels of an image that has not been resized before.
        """
        corner, shape = self._unmirror(boxes[:, :2], boxes[:, 2:], self.shapes), boxes[:, 2:]
        first, length = self._lay(corner), self._lay(shape)
        vertical, horizontal = (
            resampling_matrices(first[:, axis], length[:, axis], pixels, size)
            for axis, pixels in enumerate(self.pixels.shape[-2:])
        )
        return self._apply(vertical, horizontal)

    def cut(self, corner: Tensor, size: int) -> Tensor:
        """Return `size` x `size` pixels of the resized images from `corner` (N, 2) on; black beyond the images."""
        corner = self._unmirror(corner, torch.full_like(corner, size), self.resized_shapes)
        first, length, resized = (self._lay(v) for v in (corner, self.shapes, self.resized_shapes))
        vertical, horizontal = (
            resized_cropping_matrices(length[:, axis], resized[:, axis], first[:, axis], pixels, size)
            for axis, pixels in enumerate(self.pixels.shape[-2:])
        )
        return self._apply(vertical, horizontal)

    @property
    def is_lying(self) -> Tensor:
        """Which images (N,) lie on their side."""
        return self.shapes[:, 0] > self.shapes[:, 1]

    def _lay(self, pairs: Tensor) -> Tensor:
        """Return pairs (N, 2) of what belongs to height and width, along the rows and columns of `pixels` instead."""
        return torch.where(self.is_lying[:, None], pairs.flip(1), pairs)

    def _unmirror(self, corner: Tensor, shape: Tensor, image_shapes: Tensor) -> Tensor:
        """Return where boxes of mirrored images begin (N, 2) in the images as they were."""
        left = torch.where(self.mirrored, image_shapes[:, 1] - corner[:, 1] - shape[:, 1], corner[:, 1])
        return torch.stack([corner[:, 0], left], 1)

    def _apply(self, vertical: Tensor, horizontal: Tensor) -> Tensor:
        """Return views (N, C, size, size), upright and mirrored as noted, made by the matrices of `apply_separable`."""
        views = apply_separable(self.pixels, vertical, horizontal)
        views = torch.where(add_pixel_dimensions(self.is_lying), views.mT, views)
        return torch.where(add_pixel_dimensions(self.mirrored), views.flip(-1), views)


@runtime_checkable
class WholeImageTransform(Protocol):
    """A Transform that may stand at the beginning of a pipeline for images in their own shapes."""

    def apply_to_whole(self, images: WholeImages, draw: dict[str, Tensor]) -> Tensor | WholeImages:
        """Return what `apply` would make of each image by itself: views (N, C, h, w), or images in their own shapes.

        Like `apply`, this must ask for no value of a tensor on any device but the CPU.
        """
        ...
