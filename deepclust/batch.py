"""The batches that travel from the loader to a method, and the random numbers that belong to each."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepclust.engine.randomness import make_generator, seed_global_generators


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


@dataclass
class ImageBatch:
    """A batch as it leaves the loader: raw images, before the views are made."""

    images: Tensor  # (N, channels, H, W) uint8, or floats that are not pixels
    indices: Tensor  # (N,) int64, positions in the fit set; those of extra images lie beyond it
    draws: Draws
    extra: bool  # whether these images only train the representation and belong to no cluster
    companions: Tensor  # (N, P) int64, positions in the fit set of the images that the method asks for with each
    companion_images: Tensor  # (P, N, channels, H, W)


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


def split_to_cache_size(images: Tensor) -> tuple[Tensor, ...]:
    """Split images (N, ...) into parts whose activations fit into a CPU core's caches; on other devices, into one."""
    if images.device.type != "cpu":
        return (images,)
    return images.split(max(4, 2**19 // images.shape[1:].numel()))
