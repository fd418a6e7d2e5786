"""Sources of images: uint8 arrays, image files decoded on demand, or vectors in place of images."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from deepclust.batch import PaddedImages, pad_images, pad_lying_images
from deepclust.datasets.image_decoding import Kept, StoredSize, UnreadableImage, check_kept, decode_image
from deepclust.datasets.mapped_arrays import check_not_cut_short
from deepclust.datasets.value_ranges import ValueRanges
from deepclust.errors import InputError

PIECE_PIXELS = 2**22  # that are copied to a device at a time, so that memory holds no second copy of all images


class ImageSource(Protocol):
    """A fixed sequence of images, read by their positions."""

    @property
    def shape(self) -> tuple[int | None, int | None, int]:
        """H, W, channels of all images; H and W are None where every image has a shape of its own."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Tensor | PaddedImages:
        """Return the images at `indices` (N,) as uint8 (N, channels, H, W), in channels-last memory order.

        Vectors with D entries come as float32 (N, D, 1, 1), images in their own shapes as PaddedImages.
        """
        ...


def check_indices(indices: np.ndarray, count: int) -> None:
    """Refuse positions beyond the ends of `count` images, which NumPy would in part count from the end."""
    if len(indices) and not (indices.min() >= 0 and indices.max() < count):
        raise IndexError(f"indices {indices.min()} to {indices.max()} of {count} rows")


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
        check_indices(indices, len(self))
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


class WholeImageSource:
    """Images in their own shapes, joined in order; the arrays may be memory-mapped.

    With `channels=3`, grey images are read with three equal channels.

    Args:
        pixels: arrays (P, 1 or 3) of uint8: the pixels of all images of an array, row by row, one after the other. Of
            images that are taller than wide they follow column by column, as in PaddedImages.
        shapes: for each of these arrays, height and width (m, 2) of its images.
        channels: as they are read.
    """

    def __init__(self, pixels: Sequence[np.ndarray], shapes: Sequence[np.ndarray], channels: int) -> None:
        self.pixels = list(pixels)
        self.shapes = np.concatenate(shapes).astype(np.int64)
        self.shape: tuple[None, None, int] = (None, None, channels)
        self.array_of_image = np.repeat(np.arange(len(shapes)), [len(s) for s in shapes])
        areas = [s.astype(np.int64).prod(1) for s in shapes]
        self.starts = np.concatenate([np.cumsum(a) - a for a in areas])  # of each image in its array

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, indices: np.ndarray) -> PaddedImages:
        check_indices(indices, len(self))
        for array in self.pixels:
            check_not_cut_short(array)
        return pad_lying_images(map(self._read_one, indices), self.shapes[indices], channels=self.shape[2])

    def _read_one(self, index: int) -> np.ndarray:
        start, (short, long) = self.starts[index], sorted(self.shapes[index].tolist())
        rows = self.pixels[self.array_of_image[index]][start : start + short * long]
        return rows.reshape(short, long, -1)

    def smallest(self) -> int:
        """Return the position of an image with the shortest side of all."""
        return int(self.shapes.min(1).argmin())


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

    def __init__(
        self,
        paths: Sequence[str],
        *,
        image_size: StoredSize,
        channels: int,
        num_workers: int,
        keep: Kept = "central_squares",
        value_ranges: ValueRanges | None = None,
        max_megapixels: float | None = None,
    ) -> None:
        check_kept(image_size, keep)
        self.value_ranges, self.max_megapixels = value_ranges, max_megapixels
        # One block of bytes: a million Python strings would be copied in every forked process.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.image_size, self.keep = image_size, keep
        side = None if keep == "whole_images" or image_size == "original" else image_size
        self.shape: tuple[int | None, int | None, int] = (side, side, channels)
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: np.ndarray) -> Tensor | PaddedImages:
        return decode_in_threads(self.decode_path, self.paths[indices], self.shape, num_threads=self.num_workers)

    def decode_path(self, encoded_path: bytes) -> np.ndarray:
        path = os.fsdecode(encoded_path)
        try:
            form: dict[str, Any] = {"image_size": self.image_size, "channels": self.shape[2], "keep": self.keep}
            return decode_image(path, value_ranges=self.value_ranges, max_megapixels=self.max_megapixels, **form)
        except UnreadableImage as error:
            raise InputError(
                f"{path} cannot be read: {error}",
                expected="an image file",
                do="replace it, or remove both it and files.json in the folder of the data set in data_dir",
            ) from error


def decode_in_threads(
    decode: Callable[[Any], np.ndarray],
    places: Sequence[Any] | np.ndarray,
    shape: tuple[int | None, int | None, int],
    *,
    num_threads: int,
) -> Tensor | PaddedImages:
    """Return the images that `decode` gives for each of `places`, as a source of this `shape` reads them."""
    side, _, channels = shape
    with ThreadPoolExecutor(num_threads) as pool:
        decoded = pool.map(decode, places)
        if side is None:
            return pad_images(list(decoded), channels=channels)
        rows = np.empty((len(places), side, side, channels), np.uint8)
        for row, pixels in zip(rows, decoded, strict=True):
            row[:] = pixels
    return torch.from_numpy(rows).permute(0, 3, 1, 2)


class ResidentSource:
    """All images of another source, kept on a device, so that reading does not copy them there."""

    def __init__(self, source: ImageSource, device: torch.device) -> None:
        self.shape = source.shape
        first = read_tensor(source, np.arange(1)).permute(0, 2, 3, 1)
        self.images = torch.empty((len(source), *first.shape[1:]), dtype=first.dtype, device=device)
        for rows in np.array_split(np.arange(len(source)), -(-len(source) // 4096)):
            self.images[rows[0] : rows[-1] + 1] = read_tensor(source, rows).permute(0, 2, 3, 1)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> Tensor:
        device_indices = torch.from_numpy(indices).to(self.images.device, non_blocking=True)
        return self.images[device_indices].permute(0, 3, 1, 2)


class ResidentWholeImages:
    """All images of a WholeImageSource, kept on a device in one block without padding."""

    def __init__(self, source: WholeImageSource, device: torch.device) -> None:
        self.shape, self.shapes = source.shape, source.shapes
        areas = self.shapes.prod(1)
        self.starts = np.cumsum(areas) - areas
        channels = max(array.shape[1] for array in source.pixels)
        self.pixels = torch.empty((int(areas.sum()), channels), dtype=torch.uint8, device=device)
        stop = 0
        for array in source.pixels:
            check_not_cut_short(array)
            for first in range(0, len(array), PIECE_PIXELS):
                piece = torch.from_numpy(np.array(array[first : first + PIECE_PIXELS]))
                start, stop = stop, stop + len(piece)
                self.pixels[start:stop] = piece  # grey ones get equal channels

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, indices: np.ndarray) -> PaddedImages:
        shapes, sides = self.shapes[indices], np.sort(self.shapes[indices], 1)
        pixels = self.pixels.new_zeros(len(shapes), *sides.max(0, initial=1).tolist(), self.shape[2])
        for row, start, (short, long) in zip(pixels, self.starts[indices].tolist(), sides.tolist(), strict=True):
            row[:short, :long] = self.pixels[start : start + short * long].unflatten(0, (short, long))
        shapes_on_device = torch.from_numpy(shapes).to(pixels.device, non_blocking=True)
        return PaddedImages(pixels.permute(0, 3, 1, 2), shapes_on_device)


def count_bytes(source: ImageSource) -> float:
    """Return the bytes that all images of a source would take on a device, infinite where they cannot be kept there."""
    if isinstance(source, WholeImageSource):
        return sum(map(len, source.pixels)) * max(array.shape[1] for array in source.pixels)
    if source.shape[0] is None:  # files of shapes that are not known before they are decoded
        return math.inf
    return read_tensor(source, np.arange(1)).nbytes * len(source)


def keep_on_device(source: ImageSource, device: torch.device) -> ImageSource:
    """Return a source of the same images, which are kept on a device."""
    if isinstance(source, WholeImageSource):
        return ResidentWholeImages(source, device)
    return ResidentSource(source, device)


def read_tensor(source: ImageSource, indices: np.ndarray) -> Tensor:
    """Return images of one shape, or vectors, at `indices` (N,) as one tensor (N, channels, H, W)."""
    images = source.read(indices)
    assert isinstance(images, Tensor), "these images have shapes of their own"
    return images


def read_vectors(source: ImageSource, indices: np.ndarray) -> Tensor:
    """Return the vectors at `indices` (N,), or the pixels of images of one shape, as (N, D)."""
    return read_tensor(source, indices).flatten(1)


def read_pictures(source: ImageSource, indices: np.ndarray) -> list[np.ndarray]:
    """Return the images at `indices` (N,), each as uint8 (height, width, channels), for people to look at."""
    images = source.read(indices)
    if isinstance(images, PaddedImages):
        return images.take_apart()
    return list(images.permute(0, 2, 3, 1).numpy())


def spread_positions(source: ImageSource, count: int) -> np.ndarray:
    """Return the positions of up to `count` images, spread evenly over a source from its first to its last image."""
    return np.unique(np.linspace(0, len(source) - 1, min(count, len(source)), dtype=np.int64))


def crop_to_square(picture: np.ndarray) -> np.ndarray:
    """Return the central square of a picture (height, width, channels)."""
    side = min(picture.shape[:2])
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    return picture[top : top + side, left : left + side]


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
    # (position among all files, path, reason) of the files that could not be read, and are left out of all of the above
    unreadable: Sequence[tuple[int, str, str]] = ()
