"""Sources of images: uint8 arrays, image files decoded on demand, or vectors in place of images."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from deepclust.datasets.image_decoding import UnreadableImage, decode_image
from deepclust.datasets.mapped_arrays import check_not_cut_short
from deepclust.datasets.value_ranges import ValueRanges
from deepclust.errors import InputError


class ImageSource(Protocol):
    """A fixed sequence of images of one shape, read by their positions."""

    shape: tuple[int, int, int]  # H, W, channels

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Tensor:
        """Return the images at `indices` (N,) as uint8 (N, channels, H, W), in channels-last memory order.

        Vectors with D entries come as float32 (N, D, 1, 1).
        """
        ...


class JoinedArrays:
    """Arrays (m, ...) with rows of one shape, joined in order; each may be memory-mapped."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = list(arrays)
        self.starts = np.cumsum([0, *(len(a) for a in self.arrays)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, indices: np.ndarray, row_shape: tuple[int, ...]) -> np.ndarray:
        """Return the rows at `indices` (N,), each broadcast to `row_shape`, as (N, *row_shape).

        Raises:
            InputError: if a memory-mapped file has become shorter meanwhile.
        """
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"indices {indices.min()} to {indices.max()} of {len(self)} rows")
        rows = np.empty((len(indices), *row_shape), self.arrays[0].dtype)
        for array, start, stop in zip(self.arrays, self.starts[:-1], self.starts[1:], strict=True):
            check_not_cut_short(array)
            in_array = (indices >= start) & (indices < stop)
            rows[in_array] = array[indices[in_array] - start]
        return rows


class ArraySource:
    """Images in uint8 arrays (m, H, W, 1 or 3), joined in order; each may be memory-mapped.

    With `channels=3`, grey images are read with three equal channels.
    """

    def __init__(self, arrays: Sequence[np.ndarray], channels: int | None = None) -> None:
        self.joined = JoinedArrays(arrays)
        height, width, stored_channels = arrays[0].shape[1:]
        self.shape = (int(height), int(width), int(stored_channels if channels is None else channels))

    def __len__(self) -> int:
        return len(self.joined)

    def read(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(self.joined.read(indices, self.shape)).permute(0, 3, 1, 2)


class VectorSource:
    """Vectors in float32 arrays (m, D), joined in order and read as images of one pixel with D channels."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.joined = JoinedArrays(arrays)
        self.shape = (1, 1, int(arrays[0].shape[1]))

    def __len__(self) -> int:
        return len(self.joined)

    def read(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(self.joined.read(indices, self.shape[2:]))[:, :, None, None]


class FileSource:
    """Image files that are decoded by `decode_image` each time they are read, in `num_workers` threads.

    The files are not checked before: a file that cannot be read raises an InputError when it is read.
    """

    def __init__(self, paths: Sequence[str], *, image_size: int, channels: int, num_workers: int) -> None:
        # One block of bytes: a million Python strings would be copied in every forked process.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.shape = (image_size, image_size, channels)
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: np.ndarray) -> Tensor:
        rows = np.empty((len(indices), *self.shape), np.uint8)
        with ThreadPoolExecutor(self.num_workers) as pool:
            for row, pixels in zip(rows, pool.map(self.decode_path, self.paths[indices]), strict=True):
                row[:] = pixels
        return torch.from_numpy(rows).permute(0, 3, 1, 2)

    def decode_path(self, encoded_path: bytes) -> np.ndarray:
        path = os.fsdecode(encoded_path)
        try:
            return decode_image(path, image_size=self.shape[0], channels=self.shape[2])
        except UnreadableImage as error:
            raise InputError(
                f"{path} cannot be read: {error}",
                expected="an image file",
                do="replace it, or remove both it and files.json in the folder of the data set in data_dir",
            ) from error


class ResidentSource:
    """All images of another source, kept on a device, so that reading does not copy them there."""

    def __init__(self, source: ImageSource, device: torch.device) -> None:
        self.shape = source.shape
        first = source.read(np.arange(1))
        self.images = torch.empty((len(source), *self.shape), dtype=first.dtype, device=device)
        for rows in np.array_split(np.arange(len(source)), -(-len(source) // 4096)):
            self.images[rows[0] : rows[-1] + 1] = source.read(rows).permute(0, 2, 3, 1)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> Tensor:
        device_indices = torch.from_numpy(indices).to(self.images.device, non_blocking=True)
        return self.images[device_indices].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ImageSet:
    """A data set as a run uses it. Training sees `fit` and `extra` only; the rest is for evaluation."""

    fit: ImageSource  # the images that are trained on and clustered
    evaluation: ImageSource  # `fit` itself in the merged protocol, the test images in the split protocol
    extra: ImageSource | None = None  # unlabelled images that only help the representation
    labels: np.ndarray | None = None  # int64, one per evaluation image; -1 where unknown
    class_names: list[str] | None = None
    paths: list[str] | None = None  # one per evaluation image, if each has a file of its own
    pictures: ImageSource | None = None  # the images that the evaluation vectors were made of, if known
    name: str | None = None  # if the configuration does not tell it
    value_ranges: ValueRanges | None = None  # by which values of more than 8 bits were scaled; None if there were none
