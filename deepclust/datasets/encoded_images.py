"""Image files that lie within larger files, such as tar shards and tables, decoded each time they are read."""

import io
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from deepclust.batch import PaddedImages
from deepclust.datasets.folder import name_key
from deepclust.datasets.image_decoding import Kept, StoredSize, check_kept, decode_image
from deepclust.datasets.image_formats import UnreadableImage
from deepclust.datasets.image_sources import check_indices, decode_in_threads
from deepclust.datasets.value_ranges import ValueRanges
from deepclust.errors import InputError


class EncodedImages(Protocol):
    """A fixed sequence of image files that have not been decoded, read by their positions, also in threads."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """Return the content of the image file at a position."""
        ...

    def name(self, index: int) -> str:
        """Return what errors call the image at a position."""
        ...


class EncodedImageSource:
    """Images that are decoded by `decode_image` each time they are read, in `num_workers` threads.

    They are not checked before: an image that cannot be read raises an InputError when it is read.
    """

    def __init__(
        self,
        encoded: EncodedImages,
        *,
        image_size: StoredSize,
        channels: int,
        num_workers: int,
        keep: Kept,
        value_ranges: ValueRanges | None,
        max_megapixels: float | None,
    ) -> None:
        check_kept(image_size, keep)
        self.encoded = encoded
        self.num_workers = num_workers
        self.form: dict[str, Any] = {"image_size": image_size, "channels": channels, "keep": keep}
        self.form |= {"value_ranges": value_ranges, "max_megapixels": max_megapixels}
        side = None if keep == "whole_images" or image_size == "original" else image_size
        self.shape: tuple[int | None, int | None, int] = (side, side, channels)

    def __len__(self) -> int:
        return len(self.encoded)

    def read(self, indices: np.ndarray) -> Tensor | PaddedImages:
        check_indices(indices, len(self))
        return decode_in_threads(self._decode, indices.tolist(), self.shape, num_threads=self.num_workers)

    def _decode(self, index: int) -> np.ndarray:
        content = io.BytesIO(self.encoded.read(index))
        try:
            return decode_image(content, **self.form)
        except UnreadableImage as error:
            raise InputError(
                f"{self.encoded.name(index)} cannot be read: {name_key(str(error))}",
                expected="an image file",
                do="replace this image or leave it out, and write the file that holds it again",
            ) from error
