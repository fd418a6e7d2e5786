"""What is drawn for the images of a batch, and how it meets them on their device.

A draw is a dict of CPU tensors whose first dimension counts the images. It is made for the whole global
batch; a process uses the rows it holds.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def uniform(shape: tuple[int, ...], bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Independent uniform numbers within the two bounds, on the CPU."""
    return torch.rand(shape, generator=generator) * (bounds[1] - bounds[0]) + bounds[0]


def coin(n: int, p: float, generator: torch.Generator) -> Tensor:
    """True with probability p, for n images independently (n,)."""
    return torch.rand(n, generator=generator) < p


def rows_of(draw: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """The part of a draw that belongs to the images `rows`."""
    return {name: values[rows] for name, values in draw.items()}


AT_ONCE = 2**16  # bytes that CUDA takes from ordinary memory without waiting


def move(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on a device, without waiting for it."""
    waits = device.type == "cuda" and values.nbytes > AT_ONCE
    return (values.pin_memory() if waits else values).to(device, non_blocking=True)


def on(images: Tensor, values: Tensor) -> Tensor:
    """Values (N,) or (N, k) as (N, 1, 1, 1) or (N, k, 1, 1) on the images' device, without waiting for it."""
    return move(values, images.device).reshape(values.shape + (1,) * (4 - values.dim()))


def change(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Images (N, C, H, W) where the `chosen` rows (N,) are replaced by `operation(rows, *their parameters)`.

    `chosen` (bool) and the parameters (N, ...) are on the CPU, and so are those the operation gets: picking
    rows never waits for a device.
    """
    return change_(images.clone(), chosen, operation, *parameters) if chosen.any() else images


def change_(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """`change` in place, for images that nobody else holds."""
    rows = chosen.nonzero().flatten()
    if len(rows):
        at = move(rows, images.device)
        images.index_copy_(0, at, operation(images[at], *(values[rows] for values in parameters)))
    return images
