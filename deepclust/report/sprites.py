"""Many small pictures of one size in one image, from which a script of the page takes them one by one."""

import math
from collections.abc import Sequence

import numpy as np

from deepclust.datasets.image_sources import ImageSource, crop_to_square, read_pictures
from deepclust.report.html_fragments import (
    JPEG_QUALITY,
    PIXELATED_BELOW,
    encode_data_uri,
    shrink_image,
    to_pillow_image,
)

JPEG_BLOCK = 8  # pixels
CHUNK_SIZE = 256  # images read at once


def read_tiles(source: ImageSource, indices: np.ndarray, side: int) -> np.ndarray:
    """Return small pictures (N, h, w, channels) of the images, with sides of at most `side` pixels.

    Images in their own shapes become squares: their central ones.
    """
    tiles = []
    for start in range(0, len(indices), CHUNK_SIZE):
        for picture in read_pictures(source, indices[start : start + CHUNK_SIZE]):
            if source.shape[0] is None:
                square = to_pillow_image(crop_to_square(picture)).resize((side, side))
                tiles.append(np.asarray(square).reshape(side, side, source.shape[2]))
            else:
                tiles.append(shrink_image(picture, side))
    return np.stack(tiles)


def make_sprite(pictures: np.ndarray, *, sides: Sequence[int], max_bytes: int) -> tuple[str, dict[str, int | bool]]:
    """Return all pictures (P, h, w, channels) in one image, as a data URI, and where in it each picture is.

    The pictures get the first of `sides` pixels with which the URI has at most `max_bytes`, or the last one.
    """
    longest = max(pictures.shape[1:3])
    if longest <= PIXELATED_BELOW:
        uri = encode_data_uri(arrange_in_grid(pictures, block=1))
        if len(uri) <= max_bytes // 2:
            return uri, describe_grid(pictures, block=1)
    for side in dict.fromkeys(min(side, longest) for side in sides):
        small = np.stack([shrink_image(pixels, side) for pixels in pictures])
        uri = encode_data_uri(arrange_in_grid(small, block=JPEG_BLOCK), quality=JPEG_QUALITY, subsampling=0)
        if len(uri) <= max_bytes:
            break
    return uri, describe_grid(small, block=JPEG_BLOCK)


def describe_grid(pictures: np.ndarray, *, block: int) -> dict[str, int | bool]:
    """Return what the script needs in order to find a picture in the grid: sizes and distances in pixels, columns."""
    count, height, width = pictures.shape[:3]
    return {
        "w": width,
        "h": height,
        "dx": width + -width % block,
        "dy": height + -height % block,
        "columns": count_columns(count),
        "sharp": max(height, width) < PIXELATED_BELOW,
    }


def count_columns(count: int) -> int:
    return math.ceil(math.sqrt(count))


def arrange_in_grid(pictures: np.ndarray, *, block: int) -> np.ndarray:
    """Return pictures (P, h, w, channels) in rows of one image.

    Each is padded to whole blocks of `block` pixels, so that no JPEG block holds parts of two pictures.
    """
    count, height, width, channels = pictures.shape
    columns = count_columns(count)
    rows = math.ceil(count / columns)
    padding = ((0, rows * columns - count), (0, -height % block), (0, -width % block), (0, 0))
    padded = np.pad(pictures, padding, mode="edge")
    padded_height, padded_width = padded.shape[1:3]
    grid = padded.reshape(rows, columns, padded_height, padded_width, channels).swapaxes(1, 2)
    return grid.reshape(rows * padded_height, columns * padded_width, channels)
