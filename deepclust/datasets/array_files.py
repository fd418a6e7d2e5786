"""Opening and checking images and labels in .npy and .npz files, and loading one such file as a data set."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from deepclust.datasets.image_sources import ArraySource, ImageSet, WholeImageSource
from deepclust.datasets.labels import number_classes
from deepclust.datasets.mapped_arrays import ZIP_STARTS, map_array, read_npz
from deepclust.datasets.value_ranges import (
    MeasuredValues,
    ValueRange,
    ValueRanges,
    choose_missing_ranges,
    describe_ranges,
    is_outside,
    kind_of_values,
    list_some,
    scale_to_8_bit,
)
from deepclust.engine.small_files import read_json
from deepclust.errors import InputError
from deepclust.number_types import PositiveInt

logger = logging.getLogger(__name__)


def load_array_file(
    *,
    path: str,
    channels: PositiveInt | None,
    num_classes: PositiveInt | None,
    value_ranges: ValueRanges | None = None,
) -> ImageSet:
    """Load the images of a .npy or .npz file; all are both fitted and evaluated.

    A .npy file holds the images; uint8 is read memory-mapped. A .npz file holds an array `images`, or a single array of
    any name besides `labels`, which may be missing. `channels` is 3 to read grey images with three equal channels; None
    keeps the channels of the file. Other values than uint8 are scaled by `value_ranges`; where those say nothing, by
    what `choose_range` finds in the file.

    Raises:
        InputError: if the file is missing or holds something else, or if the labels are not `num_classes` classes, or
            if `channels` is 1 and the images have colours, or if the images have one pixel only.
    """
    file = Path(path).expanduser()
    array, labels = read_array_file(file)
    ranges = find_array_ranges(file, array, value_ranges)
    images = to_uint8_images(file, array, ranges)
    class_names = None
    if labels is not None:
        labels, class_names = number_classes({file: labels}, num_classes=num_classes, class_names=None)
    check_more_than_one_pixel(file, images)
    if channels is not None:
        check_channels(file, images, channels)
    source = ArraySource([images], channels)
    return ImageSet(source, source, labels=labels, class_names=class_names, value_ranges=ranges or None)


def read_array_file(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return images (M, H, W, 1 or 3) of any type of number and, if the file holds any, labels (M,) of integers.

    Raises:
        InputError: if the file is missing or holds something else.
    """
    arrays = open_array(file)
    images, labels = add_channel_axis(file, arrays["images"]), arrays.get("labels")
    if labels is not None:
        check_labels_shape(file, labels, len(images))
    return images, labels


def open_array(file: Path) -> dict[str, np.ndarray]:
    """Return the array `images` of a .npy file, memory-mapped, or of a .npz file, which may also hold `labels`.

    Raises:
        InputError: if the file is missing or holds something else.
    """
    if not file.is_file():
        raise InputError(
            f"{file} is not a file",
            expected="a .npy or .npz file of images",
            do="set dataset.path=FILE",
        )
    try:
        with open(file, "rb") as opened:
            is_npz = opened.read(4) in ZIP_STARTS
        return read_npz(file) if is_npz else {"images": map_array(file)}
    except InputError:
        raise
    except Exception as error:  # a broken archive can raise nearly any exception
        raise InputError(
            f"{file} cannot be read: {first_line_of(error)}",
            expected="a .npy or .npz file of numbers",
            do="write it with numpy.save(FILE, images) or numpy.savez(FILE, images=images, labels=labels)",
        ) from error


def add_channel_axis(file: Path, array: np.ndarray) -> np.ndarray:
    """Return an array of images, (M, H, W) or (M, H, W, 1 or 3), as (M, H, W, channels); `file` is where it comes from.

    Raises:
        InputError: if it has another shape.
    """
    images = array[..., None] if array.ndim == 3 else array
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        is_channels_first = images.ndim == 4 and images.shape[1] in (1, 3)
        raise InputError(
            f"{file} holds an array of shape {array.shape}",
            expected="(images, height, width) or (images, height, width, 1 or 3)",
            do="move the channels last with images.transpose(0, 2, 3, 1)"
            if is_channels_first
            else "write the images in one of these shapes",
        )
    return images


def scale_images(file: Path, array: np.ndarray, value_ranges: ValueRanges | None) -> np.ndarray:
    """Return images (M, H, W[, channels]) of any type of number as uint8 (M, H, W, channels), as from a file.

    `file` is what errors call them.

    Raises:
        InputError: if the array has another shape, or holds something else than finite numbers.
    """
    images = add_channel_axis(file, array)
    return to_uint8_images(file, images, find_array_ranges(file, images, value_ranges))


def measure_rows(file: Path, images: np.ndarray) -> list[MeasuredValues]:
    """Return the values of each image (M, H, W, channels) that was read from `file`; none for uint8.

    Raises:
        InputError: if they are no numbers, or not finite.
    """
    if images.dtype == np.uint8:
        return []
    kind = kind_of_values(images)
    if kind is None:
        raise InputError(f"{file} holds {images.dtype} values", expected="numbers", do="write the images as uint8")
    extremes = [(chunk.min((1, 2, 3)), chunk.max((1, 2, 3))) for chunk in in_chunks(images)]
    lows, highs = (np.concatenate(parts).tolist() for parts in zip(*extremes, strict=True))
    bad_rows = np.flatnonzero(~np.isfinite(np.array([lows, highs], np.float64)).all(0))
    if len(bad_rows):
        raise InputError(
            f"{file} holds {images.dtype} values that are not finite in {len(bad_rows)} of {len(images)} images, "
            f"such as image {bad_rows[0]}",
            expected="finite numbers",
            do="correct these images or leave them out",
        )
    return [MeasuredValues(kind, float(low), float(high)) for low, high in zip(lows, highs, strict=True)]


def find_array_ranges(file: Path, images: np.ndarray, given: ValueRanges | None) -> dict[str, ValueRange]:
    """Choose the range of the values of images (M, H, W, channels) that were read from `file`, unless it is `given`.

    Images outside a range that is given are named in a warning. For uint8 there is none to choose.

    Raises:
        InputError: if the values are no finite numbers, or a range that is given is none.
    """
    measured = measure_rows(file, images)
    ranges = choose_missing_ranges(measured, given)
    if measured:
        kind = measured[0].kind
        logger.info("the values of %s are scaled to 0 to 255: %s", file, describe_ranges({kind: ranges[kind]}))
    outside = [str(row) for row, item in enumerate(measured) if is_outside(item, ranges)]
    if outside:
        logger.warning(
            "%d of %d images in %s hold values outside %s, which are clipped: images %s",
            *(len(outside), len(images), file, describe_ranges(ranges), list_some(outside)),
        )
    return ranges


def in_chunks(images: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the images in order, some megabytes at a time, so that a memory-mapped file need not fit into memory."""
    size = max(2**26 // max(images[:1].nbytes, 1), 1)
    for start in range(0, len(images), size):
        yield images[start : start + size]


def to_uint8_images(file: Path, images: np.ndarray, value_ranges: ValueRanges) -> np.ndarray:
    """Return images (M, H, W, channels), which were read from `file`, as uint8, scaled by the range of their kind."""
    kind = kind_of_values(images)
    if kind is None:
        return images
    return np.concatenate([scale_to_8_bit(chunk, value_ranges[kind]) for chunk in in_chunks(images)])


def check_more_than_one_pixel(file: Path, images: np.ndarray) -> None:
    """Refuse images of one pixel, which are rows of a table."""
    if images.shape[1:3] == (1, 1):
        raise InputError(
            f"{file} holds images of {format_shape(images)}",
            expected="images of more than one pixel",
            do="write the numbers as a table and use it with dataset=features (train_features.npy, float32)",
        )


def open_npy(file: Path, expected: str) -> np.ndarray:
    """Return the array of a .npy file, memory-mapped; `expected` describes it in error messages."""
    if not file.is_file():
        raise InputError(
            f"{file} is missing",
            expected=expected,
            do="put it there, or leave its split out of dataset.source.fit, evaluate and extra",
        )
    try:
        return map_array(file)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(
            f"{file} cannot be read: {first_line_of(error)}",
            expected=f"a .npy file of {expected}",
            do="write the file again",
        ) from error


def open_images(file: Path) -> np.ndarray:
    """Return the images of a .npy file as uint8 (M, H, W, 1 or 3), memory-mapped."""
    expected = "uint8 (images, height, width, 1 or 3)"
    array = open_npy(file, expected)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape:
        raise InputError(f"{file} holds {array.dtype} {array.shape}", expected=expected, do="write the file again")
    return array


def open_stored_images(folder: Path, splits: Sequence[str], *, channels: int | None) -> ArraySource | WholeImageSource:
    """Open the images of some splits in a folder of arrays, joined in order; see `deepclust.datasets.named_datasets`.

    `channels` are those in which they are read; None: as they are stored.

    Raises:
        InputError: if a file holds something else, or does not fit the others.
    """
    files = [folder / f"{split}_images.npy" for split in splits]
    shape_files = [folder / f"{split}_shapes.npy" for split in splits]
    if not any(file.is_file() for file in shape_files):
        arrays = [open_images(file) for file in files]
        for file, array in zip(files, arrays, strict=True):
            check_same_shape(file, array, arrays[0])
            if channels is not None:
                check_channels(file, array, channels)
        return ArraySource(arrays, channels)
    opened = [open_whole_images(*pair, channels) for pair in zip(files, shape_files, strict=True)]
    pixels, shapes = zip(*opened, strict=True)
    return WholeImageSource(pixels, shapes, pixels[0].shape[1] if channels is None else channels)


def open_whole_images(file: Path, shape_file: Path, channels: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels (P, 1 or 3), memory-mapped, and the shapes (M, 2) of whole images in two .npy files."""
    expected = "integers (images, 2), the height and width of each image"
    shapes = np.array(open_npy(shape_file, expected))
    if shapes.dtype.kind not in "iu" or shapes.ndim != 2 or shapes.shape[1] != 2 or not (shapes > 0).all():
        raise InputError(f"{shape_file} holds something else", expected=expected, do="write the file again")
    num_pixels, expected = int(shapes.astype(np.int64).prod(1).sum()), "uint8 (pixels, 1 or 3)"
    pixels = open_npy(file, expected)
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] not in (1, 3) or len(pixels) != num_pixels:
        raise InputError(
            f"{file} holds {pixels.dtype} {pixels.shape}",
            expected=f"{expected}, {num_pixels} pixels as {shape_file.name} says",
            do="write both files again",
        )
    if channels is not None and pixels.shape[1] > channels:
        check_channels(file, pixels[:, None, None], channels)
    return pixels, shapes


def open_labels(file: Path, count: int) -> np.ndarray:
    """Return the labels (count,) of a .npy file, which are integers of any type."""
    labels = open_npy(file, f"int64 ({count},), one label an image")
    check_labels_shape(file, labels, count)
    return labels


def read_class_names(file: Path, num_classes: int | None) -> list[str] | None:
    """Return the class names in a JSON file, or None if there is no such file."""
    if not file.exists():
        return None
    try:
        names = read_json(file)
    except ValueError:
        names = None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list or (num_classes is not None and len(names) != num_classes):
        number = "the" if num_classes is None else str(num_classes)
        raise InputError(
            f"{file} holds {len(names)} names" if is_list else f"{file} holds no list of names",
            expected=f"a JSON list of the names of {number} classes",
            do="correct the file or remove it",
        )
    return names


def check_same_shape(file: Path, images: np.ndarray, other: np.ndarray) -> None:
    """Refuse images with another shape than those of another split."""
    if images.shape[1:] != other.shape[1:]:
        raise InputError(
            f"{file} holds images of {format_shape(images)}",
            expected=f"{format_shape(other)} as in the other splits",
            do="write all files with images of one size",
        )


def check_channels(file: Path, images: np.ndarray, channels: int) -> None:
    """Refuse colour images if `channels` is 1; grey images are accepted for 3 channels."""
    if images.shape[3] > channels:
        raise InputError(
            f"{file} holds images of {format_shape(images)} and dataset.channels is {channels}",
            expected="as many channels as the images have",
            do=f"set dataset.channels={images.shape[3]}, with dataset.mean and dataset.std to match",
        )


def check_labels_shape(file: Path, labels: np.ndarray, count: int) -> None:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise InputError(
            f"the labels in {file} are {labels.dtype} {labels.shape}",
            expected=f"int64 ({count},), one label an image",
            do="write the file again",
        )


def first_line_of(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def format_shape(images: np.ndarray) -> str:
    return " x ".join(str(size) for size in images.shape[1:])
