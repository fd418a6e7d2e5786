"""The batches that travel from the loader to a method, and the random numbers that belong to each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.engine.randomness import make_generator, seed_global_generators
from deepclust.errors import InputError


@dataclass
class Draws:
    """The random numbers that belong to one batch, the same on any number of processes.

    A global batch is the batch of one step over all processes. Every process draws for the whole of it and keeps the
    draws of its own rows, which start at `first_row`.
    """

    key: tuple[int | str, ...]  # (seed, epoch, number of the batch in the epoch)
    first_row: int
    global_batch_size: int

    def make_generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a new generator for one purpose, with the same seed on every process."""
        return make_generator(*self.key, purpose, device=device)

    def seed_layers(self, device: torch.device, rank: int) -> None:
        """Seed the global generators that layers such as dropout draw from, differently for each process `rank`."""
        seed_global_generators(device, *self.key, "layers", rank)

    def local_rows(self, size: int) -> slice:
        """Return the positions in the global batch of the `size` rows that this process holds."""
        return slice(self.first_row, self.first_row + size)

    def normal_like(self, values: Tensor, purpose: str) -> Tensor:
        """Return standard normal values of the shape, device and dtype of `values` (N, ...)."""
        shape = (self.global_batch_size, *values.shape[1:])
        drawn = torch.randn(shape, generator=self.make_generator(purpose, values.device), device=values.device)
        return drawn[self.local_rows(len(values))].to(values.dtype)

    def gumbel_like(self, values: Tensor, purpose: str) -> Tensor:
        """Return standard Gumbel values of the shape, device and dtype of `values` (N, ...)."""
        drawn = torch.empty((self.global_batch_size, *values.shape[1:]), device=values.device)
        drawn.exponential_(generator=self.make_generator(purpose, values.device))
        # Minus the logarithm of an exponential value is a Gumbel value; the bound keeps a 0 from becoming infinite.
        gumbel = -drawn.clamp(min=torch.finfo(drawn.dtype).tiny).log()
        return gumbel[self.local_rows(len(values))].to(values.dtype)


@dataclass
class PaddedImages:
    """Whole images, each of a shape of its own, side by side in one tensor, with black beyond each of them.

    An image that is taller than wide lies on its side: its rows are the columns of the tensor. Otherwise tall and wide
    images together would need a tensor that is large both ways.
    """

    pixels: Tensor  # (N, channels, H, W) uint8, each image in the upper left corner, H and W as large as needed
    shapes: Tensor  # (N, 2) int64, height and width of each image in pixels, as it stands upright

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: slice) -> "PaddedImages":
        """Return some of the images. On the CPU, nothing is left that is beyond all of them."""
        pixels, shapes = self.pixels[rows], self.shapes[rows]
        if self.is_cpu and len(shapes):
            pixels = pixels[..., : int(shapes.amin(1).max()), : int(shapes.amax(1).max())]
        return PaddedImages(pixels, shapes)

    @property
    def is_cpu(self) -> bool:
        return self.pixels.is_cpu

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def to(self, *arguments: Any, **options: Any) -> "PaddedImages":
        """Return the images on another device, with the arguments of `Tensor.to`."""
        return PaddedImages(self.pixels.to(*arguments, **options), self.shapes.to(*arguments, **options))

    def pin_memory(self) -> "PaddedImages":
        return PaddedImages(self.pixels.pin_memory(), self.shapes.pin_memory())

    def take_apart(self) -> list[np.ndarray]:
        """Return every image by itself, upright, as (height, width, channels)."""
        padded = self.pixels.cpu().permute(0, 2, 3, 1).numpy()
        images = []
        for pixels, (height, width) in zip(padded, self.shapes.tolist(), strict=True):
            lying = pixels[: min(height, width), : max(height, width)]
            images.append(lying.swapaxes(0, 1) if height > width else lying)
        return images


def lay_on_side(image: np.ndarray) -> np.ndarray:
    """Return an image (height, width, channels) as it lies in PaddedImages: with rows and columns exchanged if tall."""
    return image.swapaxes(0, 1) if image.shape[0] > image.shape[1] else image


def pad_images(images: Sequence[np.ndarray], *, channels: int) -> PaddedImages:
    """Return uint8 images (height, width, channels or 1), each of a shape of its own, as one batch on the CPU.

    Images with one channel get `channels` equal ones.
    """
    shapes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    return pad_lying_images(map(lay_on_side, images), shapes, channels=channels)


def pad_lying_images(images: Iterable[np.ndarray], shapes: np.ndarray, *, channels: int) -> PaddedImages:
    """Return images (short side, long side, channels or 1), laid on their side if tall, as one batch on the CPU.

    `shapes` (N, 2) are their heights and widths as they stand upright.
    """
    short, long = shapes.min(1), shapes.max(1)
    pixels = np.zeros((len(shapes), short.max(initial=1), long.max(initial=1), channels), np.uint8)
    for row, image in zip(pixels, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return PaddedImages(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(shapes))


@dataclass
class ImageBatch:
    """A batch as it leaves the loader: raw images, before the views are made."""

    images: Tensor | PaddedImages  # (N, channels, H, W) uint8, or floats that are not pixels
    indices: Tensor  # (N,) int64, positions in the fit set; those of extra images lie beyond it
    draws: Draws
    extra: bool  # whether these images only train the representation and belong to no cluster
    companions: Tensor  # (N, P) int64, positions in the fit set of the images that the method asks for with each
    companion_images: Tensor | list[PaddedImages]  # (P, N, channels, H, W), or P times N whole images


@dataclass
class TrainBatch:
    """A batch as a method sees it. It holds no labels, and no label can be reached from it."""

    views: tuple[Tensor, ...]  # V views (N, channels, h, w) or vectors (N, D); floats
    indices: Tensor  # (N,) int64, positions in the fit set
    draws: Draws
    extra: bool = False
    companion_views: tuple[Tensor, ...] = ()  # one view of each of the P companions, in the form of `views`
    companions: Tensor | None = None  # (N, P) int64, positions in the fit set

    def replace_views(self, *views: Tensor) -> "TrainBatch":
        """Return the same batch with other views."""
        return replace(self, views=views)

    def refuse_extra_images(self, reason: str) -> None:
        """Refuse images that only help the representation; `reason` ends the sentence that says that there are some.

        Raises:
            InputError: if this is a batch of such images.
        """
        if self.extra:
            raise InputError(
                f"the data set has extra images, {reason}",
                expected="only images that are clustered",
                do="set dataset.source.extra=[]",
            )


def split_to_cache_size(images: Tensor) -> tuple[Tensor, ...]:
    """Split images (N, ...) into parts whose activations fit into a CPU core's caches; on other devices, into one."""
    if images.device.type != "cpu":
        return (images,)
    return images.split(max(4, 2**19 // images.shape[1:].numel()))
