"""Random draws for a batch of images: making them, moving them to a device and applying operations by them.

A draw is a dict of CPU tensors whose first dimension counts the images. It is made for the whole global batch. Each
process takes the rows of its own images and moves them to the device in one copy. On the device, no operation waits for
a value and nothing else is copied from the host, so that a CUDA graph can replay all of it.

The draws of a batch hang on the random key (seed, epoch, batch number, name), where the name is one of those below, and
on nothing else: deepclust/datasets/datamodule.py makes their generator.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Names in the random keys. Changing one changes the random numbers and thus all results.
VIEWS_KEY = "views"
COMPANION_VIEWS_KEY = "views of companions"


def draw_uniform(shape: tuple[int, ...], bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Return independent uniform numbers between the two bounds, on the CPU."""
    return torch.rand(shape, generator=generator) * (bounds[1] - bounds[0]) + bounds[0]


def draw_bernoulli(n: int, p: float, generator: torch.Generator) -> Tensor:
    """Return n independent booleans (n,), each True with probability `p`."""
    return torch.rand(n, generator=generator) < p


def select_rows(draw: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Return the part of a draw that belongs to the images `rows`."""
    return {name: values[rows] for name, values in draw.items()}


Layout = tuple[tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...], ...]
"""For every packed dict, the name, dtype, shape and first byte of each of its tensors."""
ALIGNMENT = 16  # bytes


def pack_tensors(groups: Sequence[dict[str, Tensor]], device: torch.device) -> tuple[Tensor, Layout]:
    """Copy dicts of CPU tensors to a device as one buffer of bytes; return the buffer and the layout of the tensors.

    The copy does not wait for the device.
    """
    layout, byte_pieces, size = [], [], 0
    for group in groups:
        entries = []
        for name, values in group.items():
            entries.append((name, values.dtype, tuple(values.shape), size))
            byte_pieces.append((size, values.contiguous().view(torch.uint8).flatten()))
            size += math.ceil(values.nbytes / ALIGNMENT) * ALIGNMENT
        layout.append(tuple(entries))
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for first, piece in byte_pieces:
        buffer[first : first + len(piece)] = piece
    return buffer.to(device, non_blocking=True), tuple(layout)


def unpack_tensors(packed: Tensor, layout: Layout) -> list[dict[str, Tensor]]:
    """Return the dicts that `pack_tensors` packed, from its buffer and its layout."""

    def read_tensor(dtype: torch.dtype, shape: tuple[int, ...], first: int) -> Tensor:
        part = packed[first : first + math.prod(shape) * dtype.itemsize]
        if dtype == torch.bool:
            return part.reshape(shape) != 0  # torch.compile cannot view bytes as booleans
        return part.view(dtype).reshape(shape)

    return [{name: read_tensor(dtype, shape, first) for name, dtype, shape, first in entries} for entries in layout]


def make_constants(values: Sequence[float], device: torch.device) -> Tensor:
    """Return a few constants as a tensor (k,), made on the device itself: `torch.tensor` would copy from the host."""
    return torch.stack([torch.full((), value, device=device) for value in values])


def add_pixel_dimensions(values: Tensor) -> Tensor:
    """Return values (N,) or (N, k) as (N, 1, 1, 1) or (N, k, 1, 1), which broadcasts with images (N, C, H, W)."""
    return values.reshape(values.shape + (1,) * (4 - values.dim()))


def can_select_rows(images: Tensor) -> bool:
    """Whether an operation may run on the chosen images only.

    That saves work, but it needs the values of the choice, for which a GPU would have to be waited for. There, the
    operation runs on all images instead.
    """
    return images.is_cpu


def apply_to_chosen(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Return images (N, C, H, W) of which the chosen ones are replaced by `operation(chosen images, *parameters)`.

    `chosen` (N,) is boolean. The parameters (N, ...) have one row per image; the operation gets the rows of the images
    that it works on. All are on the device of the images.
    """
    if not can_select_rows(images):
        return torch.where(add_pixel_dimensions(chosen), operation(images, *parameters), images)
    return apply_to_chosen_(images.clone(), chosen, operation, *parameters) if chosen.any() else images


def apply_to_chosen_(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Like `apply_to_chosen`, but may overwrite `images`."""
    if not can_select_rows(images):
        return apply_to_chosen(images, chosen, operation, *parameters)
    rows = chosen.nonzero().flatten()
    if len(rows):
        images.index_copy_(0, rows, operation(images[rows], *(values[rows] for values in parameters)))
    return images
