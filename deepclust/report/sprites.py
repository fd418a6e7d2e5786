"""Many small pictures in one image, from which a script of the page takes them one by one."""

import math
from collections.abc import Sequence

import numpy as np

from deepclust.report.html_fragments import JPEG_QUALITY, PIXELATED_BELOW, encode_data_uri, shrink_image

JPEG_BLOCK = 8  # pixels


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
