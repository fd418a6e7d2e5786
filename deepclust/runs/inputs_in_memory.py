"""Images and vectors of a Python program as files, so that the commands read them like any others."""

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepclust.datasets.array_files import add_channel_axis, measure_rows, open_array
from deepclust.datasets.features import convert_vectors
from deepclust.datasets.value_ranges import choose_missing_ranges, describe_ranges, kind_of_values
from deepclust.engine.output_files import replace_file, write_array
from deepclust.errors import InputError
from deepclust.runs.run_folder import CHECKPOINT, RESULTS

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")  # of Pillow's images; a PNG holds them as they are


def is_path(images: Any) -> bool:
    """Return whether this names files in place of being images."""
    return isinstance(images, str | os.PathLike)


def is_list_of_paths(images: Any) -> bool:
    """Return whether this is a list that begins with a path."""
    return isinstance(images, list | tuple) and len(images) > 0 and is_path(images[0])


def is_list_of_pictures(images: Any) -> bool:
    """Return whether this is a list that begins with an image of Pillow."""
    return isinstance(images, list | tuple) and len(images) > 0 and isinstance(images[0], Image.Image)


def list_paths(images: Iterable[Any], name: str) -> list[str]:
    """Return a list of image files as absolute paths; `name` is the argument that names them.

    Raises:
        InputError: if something in the list is no path.
    """
    paths = []
    for index, path in enumerate(images):
        if not is_path(path):
            raise InputError(
                f"{name}[{index}] is a {type(path).__name__}, and {name}[0] is a path",
                expected="a list of paths, or a list of PIL images",
                do="give one kind at a time",
            )
        paths.append(os.path.abspath(os.path.expanduser(os.fsdecode(path))))
    return paths


def to_array(images: Any, name: str) -> np.ndarray:
    """Return images (M, H, W[, channels]) or vectors (M, D) as an array; `name` is the argument that holds them.

    Takes what NumPy takes, and tensors.

    Raises:
        InputError: if it is no array of numbers with two to four dimensions, or holds nothing.
    """
    if hasattr(images, "toarray"):  # a sparse matrix
        raise unknown_input_error(images, name, "sparse", do=f"hand over {name}.toarray()")
    try:
        array = to_plain_array(images)
    except Exception as error:  # rows of different lengths, and whatever __array__ of others raises
        raise unknown_input_error(images, name, str(error)) from error
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3, 4) or 0 in array.shape:
        found = f"an array of {array.dtype} with the shape {array.shape}"
        if array.dtype.kind in "buif" and array.ndim == 1 and len(array):
            raise unknown_input_error(images, name, found, do=f"hand over {name}[None] for a single row")
        if array.dtype.kind == "O" and array.ndim in (2, 3, 4):
            raise unknown_input_error(images, name, found, do=f"hand over {name}.astype(float)")
        raise unknown_input_error(images, name, found)
    return array


def to_plain_array(values: Any) -> np.ndarray:
    """Return an array of what NumPy takes for one, and of tensors wherever they are."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def warn_of_scaling(array: np.ndarray, name: str) -> None:
    """Warn that images (M, H, W[, channels]) of other numbers than uint8 are scaled, and by which range.

    Vectors (M, D) are not. `name` is the argument that holds the images.

    Raises:
        InputError: if they have another shape, or numbers that are not finite.
    """
    if array.ndim > 2 and kind_of_values(array) is not None:
        ranges = choose_missing_ranges(measure_rows(Path(name), add_channel_axis(Path(name), array)), None)
        warnings.warn(
            f"{name} holds {array.dtype}: {describe_ranges(ranges)} are scaled to 0 to 255; hand over uint8 to choose "
            "the scale yourself",
            stacklevel=3,
        )


def unknown_input_error(
    images: Any, name: str, found: str, *, do: str = "bring the images into one of these forms"
) -> InputError:
    """Return the error for something that holds neither images nor vectors; `found` says what it is."""
    return InputError(
        f"{name} is of type {type(images).__name__}: {' '.join(found.split())[:200]}",
        expected="a folder, a list of paths or of PIL images, an array (M, H, W[, channels]) of images, or (M, D) of "
        "vectors",
        do=do,
    )


def write_data_set(array: np.ndarray, labels: Any, folder: Path, run_folder: Path) -> tuple[str, Path]:
    """Write images (M, H, W[, channels]) or vectors (M, D), with labels (M,) or None, into `folder` in the run folder.

    What is there already stays. Return the data set that reads it, `arrays` or `features`, and its path.

    Raises:
        InputError: if the arrays hold something else, or the run in the folder has begun with others.
    """
    targets = None if labels is None else check_labels(labels, len(array))
    if array.ndim == 2:
        write_once(folder / "train_features.npy", convert_vectors(array, "dataset"), run_folder)
        if targets is not None:
            write_once(folder / "train_labels.npy", targets, run_folder)
        return "features", folder
    images = add_channel_axis(Path("dataset"), array)
    if targets is None:
        return "arrays", write_once(folder / "images.npy", images, run_folder)
    return "arrays", write_once(folder / "images.npz", images, run_folder, labels=targets)


def write_input_array(array: np.ndarray, folder: Path, run_folder: Path) -> Path:
    """Write images (M, H, W[, channels]) or vectors (M, D) into `folder` in the run folder; return the file.

    Raises:
        InputError: if the array holds something else, or the run in the folder has begun with another.
    """
    if array.ndim == 2:
        return write_once(folder / "vectors.npy", convert_vectors(array, "images"), run_folder)
    return write_once(folder / "images.npy", add_channel_axis(Path("images"), array), run_folder)


def check_labels(labels: Any, count: int) -> np.ndarray:
    """Return labels (M,) as int64.

    Raises:
        InputError: if they are no whole numbers, or not `count`.
    """
    array = to_plain_array(labels)
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise InputError(
            f"labels is {array.dtype} {array.shape}",
            expected=f"whole numbers ({count},), one for each image; -1 where unknown",
            do="number the classes, for example with numpy.unique(labels, return_inverse=True)[1]",
        )
    return array.astype(np.int64)


def write_once(file: Path, array: np.ndarray, run_folder: Path, *, labels: np.ndarray | None = None) -> Path:
    """Write an array as a .npy file, with labels as a .npz file, unless it is there already; return the file.

    Raises:
        InputError: if the run in the folder has begun with other data.
    """
    others = [other for other in (file.with_suffix(".npy"), file.with_suffix(".npz")) if other.is_file()]
    if others == [file] and is_same_data(file, array, labels):
        return file
    if others and ((run_folder / RESULTS).exists() or (run_folder / CHECKPOINT).exists()):
        raise InputError(
            f"{run_folder} holds a run on other data than these",
            expected="the same data when a run goes on, or another folder",
            do="give another run_dir",
        )
    for other in others:
        other.unlink()
    file.parent.mkdir(parents=True, exist_ok=True)
    if labels is None:
        write_array(file, [array], row_shape=array.shape[1:], dtype=array.dtype, total=len(array))
    else:
        with replace_file(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, images=array, labels=labels)
    return file


def is_same_data(file: Path, array: np.ndarray, labels: np.ndarray | None) -> bool:
    """Return whether a file holds this array, and the same labels, if any, bit for bit."""
    try:
        there = open_array(file)
    except InputError:
        return False
    if labels is not None and not is_same_array(there.get("labels"), labels):
        return False
    return is_same_array(there["images"], array)


def is_same_array(there: np.ndarray | None, array: np.ndarray) -> bool:
    """Return whether two arrays are of one type and shape and hold the same bytes."""
    if there is None or there.dtype != array.dtype or there.shape != array.shape:
        return False
    starts = range(0, len(array), 4096)  # rows that are compared at a time, for one array may not fit into memory
    return all(there[start : start + 4096].tobytes() == array[start : start + 4096].tobytes() for start in starts)


def write_pictures(pictures: Sequence[Any], folder: Path, name: str) -> list[str]:
    """Write images of Pillow as files named by their positions, and return these; `name` is the argument.

    The file of an image that cannot be read is empty. Other files in the folder, of an earlier call, are removed.

    Raises:
        InputError: if something in the list is no image.
        OSError: if a file cannot be written.
    """
    for index, picture in enumerate(pictures):
        if not isinstance(picture, Image.Image):
            raise InputError(
                f"{name}[{index}] is a {type(picture).__name__}, and {name}[0] is a PIL image",
                expected="a list of paths, or a list of PIL images",
                do="give one kind at a time",
            )
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index, picture in enumerate(pictures):
        suffix = ".tiff" if picture.mode == "F" else ".png"
        options: dict[str, Any] = {} if picture.mode == "F" else {"compress_level": 1}
        path = folder / f"{index:06d}{suffix}"
        try:
            shown = picture if picture.mode in (*PNG_MODES, "F") else picture.convert("RGB")
            shown.save(path, exif=picture.getexif(), **options)
        except Exception as error:  # of a file that is cut short: it is only read here
            if isinstance(error, OSError) and error.errno is not None:
                raise  # a full disk, for example
            path.write_bytes(b"")
        files.append(str(path))
    for path in set(folder.iterdir()).difference(map(Path, files)):
        path.unlink()
    return files
