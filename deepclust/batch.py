"""What travels from the loader to a method."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepclust.engine.randomness import generator, seed_global


@dataclass
class Draws:
    """The random numbers that belong to one batch, the same on any number of processes.

    Draws are made for the whole global batch of `total` rows; a process keeps those from `first` on that are its own.
    """

    key: tuple[int | str, ...]  # (seed, epoch, number of the batch in the epoch)
    first: int
    total: int

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator for one purpose, alike on every process."""
        return generator(*self.key, purpose, device=device)

    def seed_layers(self, device: torch.device, rank: int) -> None:
        """Seed what layers such as dropout draw from, on that process."""
        seed_global(device, *self.key, "layers", rank)

    def rows(self, size: int) -> slice:
        """The `size` rows of the global batch that this process holds."""
        return slice(self.first, self.first + size)

    def normal_like(self, values: Tensor, purpose: str) -> Tensor:
        """Standard normal values of the shape, device and dtype of `values` (N, ...)."""
        shape = (self.total, *values.shape[1:])
        drawn = torch.randn(shape, generator=self.generator(purpose, values.device), device=values.device)
        return drawn[self.rows(len(values))].to(values.dtype)


@dataclass
class ImageBatch:
    """A batch as it leaves the loader: raw images, before the views are made."""

    images: Tensor  # (N, channels, H, W) uint8, or floats that are no pixels
    indices: Tensor  # (N,) int64, positions in the fit set; beyond it for extra images
    draws: Draws
    extra: bool  # images that only help the representation: they belong to no cluster
    companions: Tensor  # (N, P) int64, positions in the fit set of the images that are wanted beside each
    companion_images: Tensor  # (P, N, channels, H, W)


@dataclass
class TrainBatch:
    """A batch as a method sees it. There are no labels in it, and there is no way to them from here."""

    views: tuple[Tensor, ...]  # V views (N, channels, h, w) or vectors (N, D); floats
    indices: Tensor  # (N,) int64, positions in the fit set
    draws: Draws
    extra: bool = False
    companion_views: tuple[Tensor, ...] = ()  # of P companions of each image, like `views`
    companions: Tensor | None = None  # (N, P) int64, positions in the fit set

    def replace_views(self, *views: Tensor) -> "TrainBatch":
        """The same batch with other views."""
        return replace(self, views=views)


def cache_sized(images: Tensor) -> tuple[Tensor, ...]:
    """A batch of images (N, ...) in parts whose activations a CPU core's caches hold; on another device, whole."""
    if images.device.type != "cpu":
        return (images,)
    return images.split(max(4, 2**19 // images.shape[1:].numel()))
