"""Small pictures of many images, kept as JPEGs in one file: what a report shows where the images are not kept.

SPLIT_thumbnails.bin        the JPEGs, one after the other
SPLIT_thumbnail_ends.bin    int64 (M,), where each of them ends, little-endian
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deepclust.datasets.image_sources import check_indices
from deepclust.errors import InputError

QUALITY = 85  # of the JPEGs
THUMBNAILS, ENDS = "_thumbnails.bin", "_thumbnail_ends.bin"  # after the name of the split
ENDS_TYPE = "<i8"


class ThumbnailSource:
    """Square pictures of one size, decoded each time they are read.

    Args:
        file: the JPEGs, one after the other.
        ends: where each of them ends (M,), increasing, up to the size of the file.
    """

    def __init__(self, file: Path, ends: np.ndarray) -> None:
        self.file, self.ends = file, ends
        first = self._decode(self._read_bytes(np.arange(1))[0])
        self.shape = first.shape

    def __len__(self) -> int:
        return len(self.ends)

    def read(self, indices: np.ndarray) -> Tensor:
        check_indices(indices, len(self))
        rows = np.empty((len(indices), *self.shape), np.uint8)
        for row, encoded in zip(rows, self._read_bytes(indices), strict=True):
            row[:] = self._decode(encoded)
        return torch.from_numpy(rows).permute(0, 3, 1, 2)

    def _read_bytes(self, indices: np.ndarray) -> list[bytes]:
        found = []
        with self.file.open("rb") as opened:
            for index in indices.tolist():
                start = int(self.ends[index - 1]) if index else 0
                opened.seek(start)
                found.append(opened.read(int(self.ends[index]) - start))
        return found

    def _decode(self, encoded: bytes) -> np.ndarray:
        """Return a picture as uint8 (side, side, channels).

        Raises:
            InputError: if the bytes are none.
        """
        try:
            with Image.open(io.BytesIO(encoded), formats=["JPEG"]) as picture:
                pixels = np.asarray(picture)
        except Exception as error:  # a decoder can raise nearly any exception on broken bytes
            raise InputError(
                f"{self.file} holds a thumbnail that cannot be read",
                expected="the JPEGs that deepclust cluster wrote",
                do="remove the folder that it is in and start deepclust cluster again",
            ) from error
        return pixels.reshape(*pixels.shape[:2], -1)


def encode_thumbnail(pixels: np.ndarray, side: int) -> bytes:
    """Return square uint8 pixels (H, H, channels) as a JPEG of at most `side` pixels a side."""
    picture = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    if side < pixels.shape[0]:
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=QUALITY)
    return file.getvalue()


def open_thumbnails(folder: Path, split: str, count: int) -> ThumbnailSource | None:
    """Open the thumbnails of a split in a folder; None if there are none.

    Raises:
        InputError: if they are not `count`, or cut short.
    """
    file, ends_file = folder / f"{split}{THUMBNAILS}", folder / f"{split}{ENDS}"
    if not (file.is_file() and ends_file.is_file()):
        return None
    ends = np.fromfile(ends_file, ENDS_TYPE)
    is_complete = count > 0 and len(ends) == count and int(ends[-1]) <= file.stat().st_size
    if not (is_complete and (np.diff(ends, prepend=0) > 0).all()):
        raise InputError(
            f"{ends_file} does not tell where the {count} thumbnails in {file.name} end",
            expected="both files as deepclust cluster wrote them",
            do="remove both",
        )
    return ThumbnailSource(file, ends)
