"""Finding the image files of a folder and decoding them into arrays of pixels."""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.Image import Resampling, Transpose

from deepclust.datasets.deep_colour import has_deep_colour, read_deep_colour, repair_layout
from deepclust.datasets.image_formats import IMAGE_SUFFIXES, ImageFile, UnreadableImage, open_image
from deepclust.datasets.value_ranges import (
    DEFAULT_RANGES,
    MeasuredValues,
    ValueRange,
    ValueRanges,
    choose_missing_ranges,
    is_outside,
    kind_of_values,
    scale_to_8_bit,
)
from deepclust.errors import InputError
from deepclust.number_types import PositiveInt

Kept = Literal["whole_images", "central_squares"]
"""What decoding keeps of an image: all of it, or the largest square around its centre."""
StoredSize = PositiveInt | Literal["original"]
"""The short side of decoded images in pixels, whatever it was in the file; "original": as it is there."""

MODE_OF_CHANNELS = {1: "L", 3: "RGB"}
CHUNK_SIZE = 256  # images that are measured or decoded at a time, which bounds the memory

# Tags of TIFF 6.0 for the range of the values; for signed and floating-point samples those of section 19.
BITS_PER_SAMPLE_TAG, MIN_VALUE_TAGS, MAX_VALUE_TAGS = 258, (340, 280), (341, 281)
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


def decode_image(
    file: ImageFile,
    *,
    image_size: StoredSize,
    channels: int,
    keep: Kept = "central_squares",
    value_ranges: ValueRanges | None = None,
    max_megapixels: float | None = None,
) -> np.ndarray:
    """Return the pixels of an image file as uint8 (height, width, channels); 1 channel is grey, 3 are RGB.

    The short side is resized to `image_size` (bilinear, antialiased). Of squares the other side is `image_size` too:
    the centre is taken. Whole images keep their proportions. The image is turned upright as its EXIF orientation says.
    Transparent parts become white. Of several frames, the first is taken. Values of more than 8 bits are scaled by
    `value_ranges` (see `find_value_ranges`) and clipped. Without them integers go from 0 to 65535 and floats from 0 to
    1. A large JPEG is decoded at a fraction of its size, which is at least twice `image_size`.

    Raises:
        UnreadableImage: if the file is missing, empty, truncated or not an image, has more than `max_megapixels` to
            decode (see `open_image`), or without `value_ranges` holds values outside the usual ones.
    """
    try:
        smallest_side = 2**31 - 1 if image_size == "original" else 2 * image_size
        with open_image(file, smallest_side=smallest_side, max_megapixels=max_megapixels) as opened:
            image = to_opaque_8_bit(opened, value_ranges).convert(MODE_OF_CHANNELS[channels])
            transpose = TRANSPOSE_FOR_ORIENTATION.get(opened.getexif().get(ORIENTATION_TAG, 1))
        resized = resize_kept(image, image_size, keep)
        upright = resized if transpose is None else resized.transpose(transpose)
        return np.array(upright).reshape(upright.height, upright.width, channels)
    except Exception as error:  # a decoder can raise nearly any exception on a broken file
        message = str(error) or type(error).__name__
        raise UnreadableImage(message.splitlines()[0]) from error


def resize_to_square(image: Image.Image, image_size: int) -> Image.Image:
    """Return the central square of an image, resized to `image_size` pixels a side (bilinear, antialiased)."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((image_size, image_size), Resampling.BILINEAR, box=(left, top, left + side, top + side))


def resize_kept(image: Image.Image, image_size: StoredSize, keep: Kept) -> Image.Image:
    """Return what is kept of an image, its short side resized to `image_size` pixels (bilinear, antialiased)."""
    if image_size == "original":
        check_kept(image_size, keep)
        return image
    if keep == "central_squares":
        return resize_to_square(image, image_size)
    short = min(image.size)
    width, height = (image_size * side // short for side in image.size)
    return image.resize((width, height), Resampling.BILINEAR)


def check_kept(image_size: StoredSize, keep: Kept) -> None:
    """Refuse squares in the sizes of the files, which would differ.

    Raises:
        InputError: naming the key to change.
    """
    if image_size == "original" and keep == "central_squares":
        raise InputError(
            "dataset.stored_size is original and dataset.keep is central_squares",
            expected="one size in pixels for all squares",
            do="set dataset.keep=whole_images, or dataset.stored_size=PIXELS",
        )


def convert_images(
    images: np.ndarray, *, image_size: StoredSize, channels: int, keep: Kept = "central_squares"
) -> np.ndarray:
    """Return uint8 images (n, H, W, 1 or 3) as `decode_image` would from files: (n, height, width, channels).

    Images of that height and that many channels stay as they are.
    """
    is_whole = keep == "whole_images"
    side = min(images.shape[1:3]) if is_whole else images.shape[1]
    if image_size in (side, "original") and images.shape[3] == channels:
        return np.asarray(images)
    converted = []
    for image in images:
        pixels = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert(MODE_OF_CHANNELS[channels])
        resized = pixels if side == image_size else resize_kept(pixels, image_size, keep)
        converted.append(np.asarray(resized).reshape(resized.height, resized.width, channels))
    return np.stack(converted)


def to_opaque_8_bit(image: Image.Image, value_ranges: ValueRanges | None) -> Image.Image:
    """Return an image, which has not been decoded yet, with 8-bit values and without transparency.

    Raises:
        UnreadableImage: without `value_ranges`, if the values are outside the usual ones.
    """
    repair_layout(image)
    scaled_range = (value_ranges or DEFAULT_RANGES).get("integer", DEFAULT_RANGES["integer"])
    if has_deep_colour(image) and scaled_range != DEFAULT_RANGES["integer"]:  # else the upper 8 bits are what is wanted
        values = read_deep_colour(image)
        colours, alpha = scale_to_8_bit(values[..., :3], scaled_range), (values[..., 3:] >> 8).astype(np.uint8)
        image = Image.fromarray(np.concatenate([colours, alpha], axis=2))
    image.load()
    if has_more_than_8_bits(image):
        measured = measure_values(image)
        ranges = value_ranges if value_ranges and measured.kind in value_ranges else DEFAULT_RANGES
        if ranges is DEFAULT_RANGES and is_outside(measured, ranges):
            raise UnreadableImage(f"it holds values from {measured.low:.6g} to {measured.high:.6g}")
        return Image.fromarray(scale_to_8_bit(np.asarray(image), ranges[measured.kind]))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image


# The range of the values of a set of files ------------------------------------------------------------------


def find_value_ranges(
    paths: Sequence[str], given: ValueRanges | None, *, max_megapixels: float | None = None
) -> tuple[dict[str, ValueRange], list[str]]:
    """Choose the ranges of the values of more than 8 bits in image files (`choose_range`), as one set.

    Ranges that are `given` stay. Of other files only the beginning is read.

    Returns:
        The ranges by kind of value, and the files with values outside the ranges, which will be clipped.

    Raises:
        InputError: if a range that is given is none.
    """
    measured = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), CHUNK_SIZE):
            chunk = paths[start : start + CHUNK_SIZE]
            items = pool.map(partial(measure_file, max_megapixels=max_megapixels), chunk)
            measured += [(path, item) for path, item in zip(chunk, items, strict=True) if item]
    ranges = choose_missing_ranges((item for _, item in measured), given)
    return ranges, [path for path, item in measured if is_outside(item, ranges)]


def measure_file(path: str, max_megapixels: float | None) -> MeasuredValues | None:
    """Return the values of an image file of more than 8 bits; None for any other, and for one that cannot be read."""
    try:
        with open_image(path, smallest_side=1, max_megapixels=max_megapixels) as opened:
            repair_layout(opened)
            if has_deep_colour(opened):
                colours = read_deep_colour(opened)[..., :3]
                low, high = float(colours.min()), float(colours.max())
                return MeasuredValues("integer", low, high, read_declared_range(opened))
            return measure_values(opened) if has_more_than_8_bits(opened) else None
    except Exception:  # `decode_image` will say what is wrong with the file
        return None


def has_more_than_8_bits(image: Image.Image) -> bool:
    """Return whether an image is grey and has more than 8 bits; for colours, see `has_deep_colour`."""
    return image.mode.startswith("I") or image.mode == "F"


def measure_values(image: Image.Image) -> MeasuredValues:
    """Return what is known of the values of an image of more than 8 bits.

    Raises:
        UnreadableImage: if none of its values is a finite number.
    """
    values = np.asarray(image)
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise UnreadableImage("it holds no finite number")
    kind = kind_of_values(values)
    assert kind is not None
    return MeasuredValues(kind, float(finite.min()), float(finite.max()), read_declared_range(image))


def read_declared_range(image: Image.Image) -> ValueRange | None:
    """Return the range that the tags of a TIFF state; None where they only state what its type can hold."""
    tags = getattr(image, "tag_v2", {})

    def read(names: tuple[int, ...]) -> float | None:
        value = next((tags[name] for name in names if name in tags), None)
        first = value[0] if isinstance(value, tuple) and value else value
        return float(first) if isinstance(first, Real) else None

    bits, high = read((BITS_PER_SAMPLE_TAG,)), read(MAX_VALUE_TAGS)
    if bits is None or (high is None and not 8 < bits < 16):
        return None
    high = 2**bits - 1 if high is None else high
    if image.mode != "F" and bits in (16, 32) and high in (2**bits - 1, 2 ** (bits - 1) - 1):
        return None
    low = read(MIN_VALUE_TAGS) or 0.0
    return (low, high) if low < high else None


# Many files -------------------------------------------------------------------------------------------------


def decode_in_chunks(
    paths: Sequence[str],
    *,
    image_size: StoredSize,
    channels: int,
    keep: Kept = "central_squares",
    value_ranges: ValueRanges | None = None,
    max_megapixels: float | None = None,
) -> Iterator[tuple[list[str], Any, list[tuple[str, str]]]]:
    """Decode many image files in threads, chunk by chunk and in order, as `decode_image` does.

    Yields:
        For each chunk, the paths that could be read, their images as uint8 (n, image_size, image_size, channels), or
        whole images as a list of n arrays, and (path, reason) of the files that could not be read.
    """
    check_kept(image_size, keep)

    def decode_or_explain(path: str) -> np.ndarray | str:
        try:
            return decode_image(
                path,
                image_size=image_size,
                channels=channels,
                keep=keep,
                value_ranges=value_ranges,
                max_megapixels=max_megapixels,
            )
        except UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), CHUNK_SIZE):
            chunk = paths[start : start + CHUNK_SIZE]
            results = list(zip(chunk, pool.map(decode_or_explain, chunk), strict=True))
            readable = [(path, pixels) for path, pixels in results if isinstance(pixels, np.ndarray)]
            images: Any = [pixels for _, pixels in readable]
            if keep == "central_squares":
                images = np.empty((len(readable), image_size, image_size, channels), np.uint8)
                for row, (_, pixels) in zip(images, readable, strict=True):
                    row[:] = pixels
            unreadable = [(path, reason) for path, reason in results if isinstance(reason, str)]
            yield [path for path, _ in readable], images, unreadable
