"""Drawers with all images of each cluster: one sheet of small pictures, which a script takes apart."""

import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from deepclust.datasets.image_sources import ImageSource, spread_positions
from deepclust.report.html_fragments import JPEG_QUALITY, PIXELATED_BELOW, encode_data_uri, image_name
from deepclust.report.sprites import arrange_in_grid, describe_grid, read_tiles

MAX_BYTES = 5_500_000  # of all sheets as text
MAX_IMAGES = 6000  # in all drawers; of more images, every n-th of each cluster is there
TILE_SIDES = (112, 96, 80, 64, 48, 32)  # pixels; the largest that fits is taken. JPEG likes multiples of 16
NUM_MEASURED = 64  # images by which it is judged how large the sheets become
JPEG_BLOCK = 16  # pixels, because colours have half the resolution


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
    side, use_jpeg = choose_form(source, num_shown)
    drawers = {}
    for cluster, shown in shown_of.items():
        uri, grid = make_sheet(read_tiles(source, shown, side), use_jpeg=use_jpeg)
        sheet = grid | {
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


def choose_form(source: ImageSource, num_images: int) -> tuple[int, bool]:
    """Return the longest side of a tile in pixels, and whether sheets are JPEGs, not PNGs.

    Images of few pixels stay exact in PNGs where sheets of `num_images` images have MAX_BYTES at most. Otherwise JPEGs
    get the largest of TILE_SIDES with which they have, or the last one. It is judged by a sheet of some images, spread
    evenly over the data set.
    """
    rows = spread_positions(source, NUM_MEASURED)
    # Images in their own shapes become squares, which are scaled to any side.
    longest = max(TILE_SIDES[0] if side is None else side for side in source.shape[:2])
    forms = [(side, True) for side in dict.fromkeys(min(side, longest) for side in TILE_SIDES)]
    if longest < PIXELATED_BELOW:
        forms.insert(0, (longest, False))
    for side, use_jpeg in forms:
        uri, _ = make_sheet(read_tiles(source, rows, side), use_jpeg=use_jpeg)
        if len(uri) / len(rows) * num_images <= MAX_BYTES:
            break
    return side, use_jpeg


def make_sheet(tiles: np.ndarray, *, use_jpeg: bool) -> tuple[str, dict[str, Any]]:
    """Return tiles (N, h, w, channels) in one image, as a data URI, and where in it each tile is."""
    block = JPEG_BLOCK if use_jpeg else 1
    options = {"quality": JPEG_QUALITY, "optimize": True} if use_jpeg else {}
    return encode_data_uri(arrange_in_grid(tiles, block=block), **options), describe_grid(tiles, block=block)
