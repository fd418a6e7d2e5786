"""Colour images of 16 bits a channel, of which Pillow by itself keeps the upper 8 bits.

Pillow has no kind of image for them: its decoders drop the lower byte of each value. They take the other byte where
they are told the other byte order, so that a second pass over the file brings the lower 8 bits. That holds for PNG and
TIFF with red, green and blue, alone or with transparency, in one plane or several, and for grey PNG with transparency.
"""

import io
import re
import sys
from typing import Any

import numpy as np
from PIL import Image

DEEP_COLOUR = re.compile(
    r"(RGB[AX]?|[RGBA]);16([LBN])"
)  # Pillow's names of such layouts, the last letter for the order
OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
GREY_WITH_ALPHA = "LA;16B"
BITS_PER_SAMPLE_TAG, PLANES_TAG, SEPARATE_PLANES = 258, 284, 2  # of TIFF 6.0


def repair_layout(image: Any) -> None:
    """Let Pillow read a TIFF of 16 bits in separate planes without compression, which it takes for one of 8 bits.

    It must not have been decoded yet.
    """
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE_TAG, ())
    layouts = [read_layout(tile) for tile in list_tiles(image)]
    if {*bits} == {16} and layouts and all(re.fullmatch("[RGBA]", layout) for layout in layouts):
        order = "L" if image.tag_v2.prefix == b"II" else "B"
        image.tile = [
            with_layout(tile, f"{layout};16{order}") for tile, layout in zip(image.tile, layouts, strict=True)
        ]


def has_deep_colour(image: Image.Image) -> bool:
    """Return whether an image, which must not have been decoded yet, has colours of 16 bits."""
    tiles = list_tiles(image)
    return bool(tiles) and all(name_lower_layout(read_layout(tile)) for tile in tiles)


def read_deep_colour(image: Any) -> np.ndarray:
    """Return the values of an image with colours of 16 bits as uint16 (H, W, 3), or (H, W, 4) with transparency.

    It is decoded here, and must not have been before. Of a compressed TIFF in separate planes, the lower 8 bits are 0.
    """
    if {tile[0] for tile in list_tiles(image)} == {"libtiff"} and image.tag_v2.get(PLANES_TAG) == SEPARATE_PLANES:
        return np.asarray(image).astype(np.uint16) << 8  # libtiff's decoder knows one order only: coarse, but not dark
    lower_tiles = [with_layout(tile, name_lower_layout(read_layout(tile))) for tile in image.tile]
    is_grey = any(read_layout(tile) == GREY_WITH_ALPHA for tile in image.tile)
    file = image.filename or io.BytesIO(image.fp.getvalue())  # without a name, it is in memory
    with Image.open(file, formats=[image.format]) as second:
        second.tile = lower_tiles
        lower = np.asarray(second)
    if is_grey:  # upper and lower byte of grey, then of alpha
        lower = lower[..., [1, 1, 1, 3]]
    return np.asarray(image).astype(np.uint16) << 8 | lower


def list_tiles(image: Any) -> list[Any]:
    """Return the parts in which an image file is decoded, as Pillow keeps them until then."""
    return list(getattr(image, "tile", None) or [])


def read_layout(tile: Any) -> str:
    """Return Pillow's name of how the values of a tile of an image file are laid out."""
    arguments = tile[3]
    return arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ""


def with_layout(tile: Any, layout: str) -> Any:
    """Return a tile of an image file with another layout."""
    return tile._replace(args=layout if isinstance(tile.args, str) else (layout, *tile.args[1:]))


def name_lower_layout(layout: str) -> str:
    """Return the layout by which Pillow reads the lower bytes where `layout` brings the upper ones; "" for others."""
    if layout == GREY_WITH_ALPHA:
        return "RGBA"  # of 8 bits: four bytes for a pixel
    found = DEEP_COLOUR.fullmatch(layout)
    return f"{found[1]};16{OTHER_ORDER[found[2]]}" if found else ""
