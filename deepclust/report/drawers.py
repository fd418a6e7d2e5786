"""Drawers with all images of each cluster: one sheet of small pictures, which a script takes apart."""

import json
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from deepclust.datasets.image_sources import ImageSource, crop_to_square, read_pictures
from deepclust.report.html_fragments import (
    JPEG_QUALITY,
    PIXELATED_BELOW,
    encode_data_uri,
    image_name,
    shrink_image,
    to_pillow_image,
)
from deepclust.report.sprites import arrange_in_grid, describe_grid

MAX_BYTES = 5_500_000  # of all sheets as text
MAX_IMAGES = 6000  # in all drawers; of more images, every n-th of each cluster is there
TILE_SIDES = (112, 96, 80, 64, 48, 32)  # pixels; the largest that fits is taken. JPEG likes multiples of 16
NUM_MEASURED = 64  # images by which it is judged how large the sheets become
CHUNK_SIZE = 256  # images read at once


def render_drawers(
    assignments: np.ndarray,
    confidence: np.ndarray,
    *,
    source: ImageSource | None,
    paths: Sequence[str] | None,
    links: Callable[[int], str] | None,
    clusters: Sequence[int],
) -> dict[int, str]:
    """Return the HTML of a drawer with the images of each of `clusters`, the most confident first.

    assignments (M,), confidence (M,) and paths belong to the images of `source`; `links` gives the link to the file of
    an image by its position. There are no drawers without a source.
    """
    if source is None or not len(source):
        return {}
    every = -(-len(assignments) // MAX_IMAGES)
    members_of = {cluster: np.flatnonzero(assignments == cluster) for cluster in clusters}
    shown_of = {
        k: members[np.argsort(-confidence[members], kind="stable")][::every] for k, members in members_of.items()
    }
    num_shown = sum(map(len, shown_of.values()))
    side = choose_tile_side(source, num_shown)
    drawers = {}
    for cluster, shown in shown_of.items():
        tiles = read_tiles(source, shown, side)
        is_small = max(tiles.shape[1:3]) < PIXELATED_BELOW and max(_longest_side(source), 1) <= side
        uri = encode_data_uri(
            arrange_in_grid(tiles, block=1 if is_small else 16),
            **({} if is_small else {"quality": JPEG_QUALITY, "optimize": True}),
        )
        sheet = describe_grid(tiles, block=1 if is_small else 16) | {
            "names": [image_name(index, paths) for index in shown.tolist()],
            "confidence": [round(float(value), 2) for value in confidence[shown]],
            "cluster": cluster,
        }
        if links is not None:
            sheet["links"] = [links(index) for index in shown.tolist()]
        num_members = len(members_of[cluster])
        title = f"All {num_members:,} images" if every == 1 else f"Every {ordinal(every)} of {num_members:,} images"
        drawers[cluster] = (
            f'<details class="drawer" data-sheet="{escape(json.dumps(sheet))}"><summary>{title}</summary>'
            f'<img class="sheet" loading="lazy" src="{uri}" alt=""></details>'
        )
    return drawers


def ordinal(number: int) -> str:
    """Return a number as a word that counts: `2nd`, `3rd`, `11th`."""
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number:,}{'th' if number % 100 in (11, 12, 13) else endings.get(number % 10, 'th')}"


def choose_tile_side(source: ImageSource, num_images: int) -> int:
    """Return the largest side in pixels with which sheets of `num_images` images have MAX_BYTES at most.

    It is judged by a sheet of some images, spread evenly over the data set.
    """
    rows = np.unique(np.linspace(0, len(source) - 1, min(NUM_MEASURED, len(source)), dtype=np.int64))
    for side in TILE_SIDES:
        sheet = arrange_in_grid(read_tiles(source, rows, side), block=16)
        num_characters = len(encode_data_uri(sheet, quality=JPEG_QUALITY, optimize=True))
        if num_characters / len(rows) * num_images <= MAX_BYTES:
            break
    return side


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


def _longest_side(source: ImageSource) -> int:
    """Return the longer side of images of one shape in pixels; of images in their own shapes, more than any tile's."""
    return max(TILE_SIDES[0] + 1 if side is None else side for side in source.shape[:2])
