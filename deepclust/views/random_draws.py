"""What is drawn for the images of a batch, and how it meets them on their device.

A draw is a dict of CPU tensors whose first dimension counts the images. It is made for the whole global
batch; a process uses the rows it holds, and moves them to the device of its images in one copy. There, nothing
asks for a value and nothing more is copied from the host, so that a CUDA graph can repeat all of it.
"""

import math
from collections.abc import Callable, Sequence

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


Layout = tuple[tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...], ...]
"""Of every dict, the name, type, shape and first byte of its tensors."""
ALIGNMENT = 16  # bytes


def pack(groups: Sequence[dict[str, Tensor]], device: torch.device) -> tuple[Tensor, Layout]:
    """Dicts of CPU tensors in one buffer of bytes on a device, copied without waiting for it, and where they lie."""
    layout, pieces, size = [], [], 0
    for group in groups:
        places = []
        for name, values in group.items():
            places.append((name, values.dtype, tuple(values.shape), size))
            pieces.append((size, values.contiguous().view(torch.uint8).flatten()))
            size += math.ceil(values.nbytes / ALIGNMENT) * ALIGNMENT
        layout.append(tuple(places))
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for first, piece in pieces:
        buffer[first : first + len(piece)] = piece
    return buffer.to(device, non_blocking=True), tuple(layout)


def unpack(packed: Tensor, layout: Layout) -> list[dict[str, Tensor]]:
    """The dicts that were packed."""

    def values(dtype: torch.dtype, shape: tuple[int, ...], first: int) -> Tensor:
        part = packed[first : first + math.prod(shape) * dtype.itemsize]
        if dtype == torch.bool:
            return part.reshape(shape) != 0  # torch.compile knows no view of bytes as booleans
        return part.view(dtype).reshape(shape)

    return [{name: values(dtype, shape, first) for name, dtype, shape, first in places} for places in layout]


def numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """A few constants (k,), made on the device itself: `torch.tensor` would copy them from the host."""
    return torch.stack([torch.full((), value, device=device) for value in values])


def per_image(values: Tensor) -> Tensor:
    """Values (N,) or (N, k) as (N, 1, 1, 1) or (N, k, 1, 1), to meet images."""
    return values.reshape(values.shape + (1,) * (4 - values.dim()))


def by_rows(images: Tensor) -> bool:
    """Whether rows are picked, which saves work but asks for values; else all rows are worked on."""
    return images.is_cpu


def change(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Images (N, C, H, W) where the `chosen` rows (N,) are replaced by `operation(rows, *their parameters)`.

    `chosen` (bool) and the parameters (N, ...) are on the images' device.
    """
    if not by_rows(images):
        return torch.where(per_image(chosen), operation(images, *parameters), images)
    return change_(images.clone(), chosen, operation, *parameters) if chosen.any() else images


def change_(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """`change` of images that nobody else holds, which it may overwrite."""
    if not by_rows(images):
        return change(images, chosen, operation, *parameters)
    rows = chosen.nonzero().flatten()
    if len(rows):
        images.index_copy_(0, rows, operation(images[rows], *(values[rows] for values in parameters)))
    return images
