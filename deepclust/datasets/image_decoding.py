"""Image files: found in a folder, turned into pixels."""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Resampling, Transpose

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # what a file holds, whatever its name says
Image.init()  # loads all formats; Image.open with a choice of them does not
CHUNK = 256  # images decoded at a time: bounds the memory

ORIENTATION_TAG = 0x0112  # EXIF 2.3, section 4.6.4
TURNS = {  # from the stored picture to the upright one
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class UnreadableImage(Exception):
    """A file that cannot be turned into pixels; the text says why, in one line."""


def scan(folder: Path) -> tuple[list[tuple[str, int, int]], Counter[str]]:
    """Image files below a folder, sorted, as (path relative to it, bytes, modification time in ns).

    The second result counts the files of other kinds by suffix. Names that begin with a dot are passed over.
    Links are followed, but no folder is entered twice, so a link back to a folder above ends there.

    Raises:
        OSError: a folder below cannot be listed.
    """
    files: list[tuple[str, int, int]] = []
    others: Counter[str] = Counter()
    entered: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        below = pending.pop()
        here = os.stat(os.path.join(folder, below))
        if (here.st_dev, here.st_ino) in entered:
            continue
        entered.add((here.st_dev, here.st_ino))
        with os.scandir(os.path.join(folder, below)) as entries:
            listed = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        folders = []
        for entry in listed:
            path, suffix = os.path.join(below, entry.name), os.path.splitext(entry.name)[1].lower()
            try:
                status: os.stat_result | None = entry.stat()
            except OSError:  # a link to nothing: kept if its name is an image's, and reported as unreadable
                status = None
            if status is not None and stat.S_ISDIR(status.st_mode):
                folders.append(path)
            elif suffix not in SUFFIXES:
                others[suffix] += 1
            elif status is None:
                files.append((path, 0, 0))
            elif stat.S_ISREG(status.st_mode):
                files.append((path, status.st_size, status.st_mtime_ns))
        pending += reversed(folders)
    return sorted(files), others


def decode(path: str | os.PathLike[str], *, image_size: int, channels: int) -> np.ndarray:
    """The pixels of an image file as uint8 (image_size, image_size, channels), channels 1 (grey) or 3 (RGB).

    The short side is resized to `image_size` (bilinear, antialiased) and the central square kept; upright by
    its EXIF orientation, transparency on white, the first frame of several. 16-bit and 32-bit grey from 0 to
    65535 becomes 0 to 255, and so does float grey from 0 to 1. A large JPEG is decoded at a fraction of its
    size, at least twice `image_size`.

    Raises:
        UnreadableImage: the file is missing, empty, cut short or no image.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        with Image.open(path, formats=FORMATS) as opened:
            opened.draft(None, (2 * image_size, 2 * image_size))
            opened.load()
            image = flatten(opened).convert(mode)
            turn = TURNS.get(opened.getexif().get(ORIENTATION_TAG, 1))
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        square = image.resize((image_size, image_size), Resampling.BILINEAR, box=(left, top, left + side, top + side))
        upright = square if turn is None else square.transpose(turn)
        return np.array(upright).reshape(image_size, image_size, channels)
    except Exception as error:  # a broken file can raise nearly anything from a decoder
        text = str(error) or type(error).__name__
        raise UnreadableImage(text.splitlines()[0]) from error


def flatten(image: Image.Image) -> Image.Image:
    """An image of 8-bit values without transparency."""
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image, np.float64), 0, 65535)
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode == "F":
        return Image.fromarray(np.rint(np.clip(np.asarray(image), 0, 1) * 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image


def read_images(
    paths: Sequence[str], *, image_size: int, channels: int
) -> Iterator[tuple[list[str], np.ndarray, list[tuple[str, str]]]]:
    """Decode many files in threads, a chunk at a time and in order.

    Yields:
        The paths that could be read, their images as uint8 (n, image_size, image_size, channels), and
        (path, reason) of those that could not.
    """

    def attempt(path: str) -> np.ndarray | str:
        try:
            return decode(path, image_size=image_size, channels=channels)
        except UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), CHUNK):
            chunk = paths[start : start + CHUNK]
            results = list(zip(chunk, pool.map(attempt, chunk), strict=True))
            readable = [(path, pixels) for path, pixels in results if isinstance(pixels, np.ndarray)]
            images = np.empty((len(readable), image_size, image_size, channels), np.uint8)
            for row, (_, pixels) in zip(images, readable, strict=True):
                row[:] = pixels
            unreadable = [(path, reason) for path, reason in results if isinstance(reason, str)]
            yield [path for path, _ in readable], images, unreadable
