"""Finding the image files of a folder and decoding them into arrays of pixels."""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Resampling, Transpose

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # of the content of a file; its name need not agree
Image.init()  # loads the plugins of all formats, which Image.open does not do when formats are chosen
CHUNK_SIZE = 256  # images that are decoded at a time, which bounds the memory

ORIENTATION_TAG = 0x0112  # EXIF 2.3, section 4.6.4
TRANSPOSE_FOR_ORIENTATION = {  # from the stored image to the upright one
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class UnreadableImage(Exception):
    """Raised for a file that cannot be decoded; the message is one line with the reason."""


def find_image_files(folder: Path) -> tuple[list[tuple[str, int, int]], Counter[str]]:
    """Find all image files below a folder.

    Names that begin with a dot are ignored. Links are followed, but no folder is entered twice, so that a link to a
    folder above does no harm.

    Returns:
        The image files as (path relative to the folder, size in bytes, modification time in ns), sorted, and the number
        of other files by suffix.

    Raises:
        OSError: if a folder cannot be listed.
    """
    files: list[tuple[str, int, int]] = []
    others: Counter[str] = Counter()
    entered: set[tuple[int, int]] = set()
    pending = [""]  # folders, relative to `folder`
    while pending:
        subfolder = pending.pop()
        subfolder_status = os.stat(os.path.join(folder, subfolder))
        identity = (subfolder_status.st_dev, subfolder_status.st_ino)
        if identity in entered:
            continue
        entered.add(identity)
        with os.scandir(os.path.join(folder, subfolder)) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        folders = []
        for entry in visible:
            path, suffix = os.path.join(subfolder, entry.name), os.path.splitext(entry.name)[1].lower()
            try:
                status: os.stat_result | None = entry.stat()
            except OSError:  # a broken link: listed if it has the name of an image, and later reported as unreadable
                status = None
            if status is not None and stat.S_ISDIR(status.st_mode):
                folders.append(path)
            elif suffix not in IMAGE_SUFFIXES:
                others[suffix] += 1
            elif status is None:
                files.append((path, 0, 0))
            elif stat.S_ISREG(status.st_mode):
                files.append((path, status.st_size, status.st_mtime_ns))
        pending += reversed(folders)
    return sorted(files), others


def decode_image(path: str | os.PathLike[str], *, image_size: int, channels: int) -> np.ndarray:
    """Return the pixels of an image file as uint8 (image_size, image_size, channels); 1 channel is grey, 3 are RGB.

    The short side is resized to `image_size` (bilinear, antialiased), and the central square is taken. The image is
    turned upright as its EXIF orientation says. Transparent parts become white. Of several frames, the first is taken.
    16-bit and 32-bit grey values from 0 to 65535 are scaled to 0 to 255, and so are float grey values from 0 to 1. A
    large JPEG is decoded at a fraction of its size, which is at least twice `image_size`.

    Raises:
        UnreadableImage: if the file is missing, empty, truncated or not an image.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as opened:
            opened.draft(None, (2 * image_size, 2 * image_size))
            opened.load()
            image = to_opaque_8_bit(opened).convert(mode)
            transpose = TRANSPOSE_FOR_ORIENTATION.get(opened.getexif().get(ORIENTATION_TAG, 1))
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        square = image.resize((image_size, image_size), Resampling.BILINEAR, box=(left, top, left + side, top + side))
        upright = square if transpose is None else square.transpose(transpose)
        return np.array(upright).reshape(image_size, image_size, channels)
    except Exception as error:  # a decoder can raise nearly any exception on a broken file
        message = str(error) or type(error).__name__
        raise UnreadableImage(message.splitlines()[0]) from error


def to_opaque_8_bit(image: Image.Image) -> Image.Image:
    """Return the image with 8-bit values and without transparency."""
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image, np.float64), 0, 65535)
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode == "F":
        return Image.fromarray(np.rint(np.clip(np.asarray(image), 0, 1) * 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image


def decode_in_chunks(
    paths: Sequence[str], *, image_size: int, channels: int
) -> Iterator[tuple[list[str], np.ndarray, list[tuple[str, str]]]]:
    """Decode many image files in threads, chunk by chunk and in order.

    Yields:
        For each chunk, the paths that could be read, their images as uint8 (n, image_size, image_size, channels), and
        (path, reason) of the files that could not be read.
    """

    def decode_or_explain(path: str) -> np.ndarray | str:
        try:
            return decode_image(path, image_size=image_size, channels=channels)
        except UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), CHUNK_SIZE):
            chunk = paths[start : start + CHUNK_SIZE]
            results = list(zip(chunk, pool.map(decode_or_explain, chunk), strict=True))
            readable = [(path, pixels) for path, pixels in results if isinstance(pixels, np.ndarray)]
            images = np.empty((len(readable), image_size, image_size, channels), np.uint8)
            for row, (_, pixels) in zip(images, readable, strict=True):
                row[:] = pixels
            unreadable = [(path, reason) for path, reason in results if isinstance(reason, str)]
            yield [path for path, _ in readable], images, unreadable
