"""Opening and checking images and labels in .npy and .npz files, and loading one such file as a data set."""

import json
import zipfile
from pathlib import Path

import numpy as np

from deepclust.datasets.image_sources import ArraySource, ImageSet
from deepclust.errors import InputError


def load_array_file(*, path: str, channels: int | None, num_classes: int | None) -> ImageSet:
    """Load the images of a .npy or .npz file; all are both fitted and evaluated.

    `channels` is 3 to read grey images with three equal channels; None keeps the channels of the file.

    Raises:
        InputError: as `open_array_file`, or if a label is not below `num_classes`, or if `channels` is 1 and the images
            have colours.
    """
    images, labels = open_array_file(path)
    if labels is not None:
        check_labels(Path(path), labels, num_classes)
    if channels is not None:
        check_channels(Path(path), images, channels)
    source = ArraySource([images], channels)
    return ImageSet(source, source, labels=labels)


def open_array_file(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return images as uint8 (M, H, W, 1 or 3) and, if the file holds any, labels (M,) as int64, else None.

    A .npy file holds the images and is read memory-mapped. A .npz file holds an array `images`, or a single
    array of any name besides `labels`, which may be missing. Floats from 0 to 1 are scaled to 0 to 255.

    Raises:
        InputError: if the file is missing or holds something else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(
            f"{file} is not a file",
            expected="a .npy or .npz file of images",
            do="set dataset.path=FILE",
        )
    try:
        content = np.load(file, mmap_mode="r", allow_pickle=False)
        arrays = {"images": content} if isinstance(content, np.ndarray) else dict(content)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{file} cannot be read: {first_line_of(error)}",
            expected="a .npy or .npz file of numbers",
            do="write it with numpy.save(FILE, images) or numpy.savez(FILE, images=images, labels=labels)",
        ) from error
    labels = arrays.pop("labels", None)
    if "images" not in arrays and len(arrays) != 1:
        raise InputError(
            f"{file} holds {', '.join(arrays) or 'no array of images'}",
            expected="an array named images",
            do="write it with numpy.savez(FILE, images=images, labels=labels)",
        )
    images = to_uint8_images(file, arrays["images"] if "images" in arrays else next(iter(arrays.values())))
    if labels is not None:
        check_labels_shape(file, labels, len(images))
        labels = labels.astype(np.int64)
    return images, labels


def to_uint8_images(file: Path, array: np.ndarray) -> np.ndarray:
    """Return an array of images, which was read from `file`, as uint8 (M, H, W, 1 or 3)."""
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
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind == "f" and images.min() >= 0 and images.max() <= 1:
        return np.rint(images * 255).astype(np.uint8)
    raise InputError(
        f"{file} holds {array.dtype} values" + (" below 0 or above 1" if array.dtype.kind == "f" else ""),
        expected="uint8 from 0 to 255, or floats from 0 to 1",
        do="scale the images and write them as uint8",
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
        return np.load(file, mmap_mode="r", allow_pickle=False)
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


def open_labels(file: Path, count: int, num_classes: int | None) -> np.ndarray:
    """Return the labels (count,) of a .npy file as int64."""
    labels = open_npy(file, f"int64 ({count},), one label an image")
    check_labels_shape(file, labels, count)
    check_labels(file, labels, num_classes)
    return labels.astype(np.int64)


def read_class_names(file: Path, num_classes: int | None) -> list[str] | None:
    """Return the class names in a JSON file, or None if there is no such file."""
    if not file.exists():
        return None
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
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


def check_labels(file: Path, labels: np.ndarray, num_classes: int | None) -> None:
    """Refuse labels that are neither a class nor -1 (unknown)."""
    if labels.min() < -1 or (num_classes is not None and labels.max() >= num_classes):
        upper = "" if num_classes is None else f" to {num_classes - 1}, for dataset.num_classes is {num_classes}"
        raise InputError(
            f"the labels in {file} go from {labels.min()} to {labels.max()}",
            expected=f"classes from 0{upper}",
            do="correct the labels or dataset.num_classes",
        )


def first_line_of(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def format_shape(images: np.ndarray) -> str:
    return " x ".join(str(size) for size in images.shape[1:])
