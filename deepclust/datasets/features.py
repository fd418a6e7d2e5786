"""Data sets of vectors in place of images: features written by `deepclust features`, or a table of your own.

Their folder holds, for each split (train, test):

    SPLIT_features.npy   float32 (M, D), read memory-mapped
    SPLIT_labels.npy     int64 (M,); may be missing
    SPLIT_images.npy     uint8 (M, H, W, 1 or 3), the images that the vectors were made of; may be missing
    SPLIT_paths.json     a list of M files that the vectors were made of; may be missing
    class_names.json     a list of C names; may be missing
"""

import json
from pathlib import Path

import numpy as np

from deepclust.datasets.array_files import open_images, open_labels, open_npy, read_class_names
from deepclust.datasets.image_sources import ArraySource, ImageSet, VectorSource
from deepclust.datasets.labels import number_classes
from deepclust.errors import InputError
from deepclust.number_types import PositiveInt


def load_features(*, path: str, num_classes: PositiveInt | None) -> ImageSet:
    """Load the vectors of a folder: the split train is fitted, and test is evaluated if it exists, else train.

    Raises:
        InputError: if a file is missing, holds something else, or does not fit the others.
    """
    folder = Path(path).expanduser()
    if not (folder / "train_features.npy").is_file():
        raise InputError(
            f"{folder} holds no train_features.npy",
            expected="vectors, float32 (M, D)",
            do="make them with deepclust features, or write a table there with numpy.save",
        )
    evaluated_split = "test" if (folder / "test_features.npy").is_file() else "train"
    train = open_vectors(folder / "train_features.npy")
    test = train if evaluated_split == "train" else open_vectors(folder / "test_features.npy")
    if train.shape[1] != test.shape[1]:
        raise InputError(
            f"the vectors of train have {train.shape[1]} numbers, those of test {test.shape[1]}",
            expected="the same number in both",
            do="make both files with the same network",
        )
    fit = VectorSource([train])
    label_file, pictures = folder / f"{evaluated_split}_labels.npy", folder / f"{evaluated_split}_images.npy"
    labels, class_names = None, read_class_names(folder / "class_names.json", num_classes)
    if label_file.is_file():
        labels, class_names = number_classes(
            {label_file: open_labels(label_file, len(test))}, num_classes=num_classes, class_names=class_names
        )
    return ImageSet(
        fit=fit,
        evaluation=fit if evaluated_split == "train" else VectorSource([test]),
        labels=labels,
        class_names=class_names,
        paths=read_paths(folder / f"{evaluated_split}_paths.json", len(test)),
        pictures=ArraySource([open_pictures(pictures, len(test))]) if pictures.is_file() else None,
        name=folder.absolute().name,
    )


def open_vectors(file: Path) -> np.ndarray:
    """Return the vectors of a .npy file as float32 (M, D), memory-mapped, after checking all of them.

    Raises:
        InputError: if the file holds something else, or numbers that are not finite.
    """
    expected = "float32 (rows, numbers)"
    array = open_npy(file, expected)
    if array.dtype != np.float32 or array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{file} holds {array.dtype} {array.shape}", expected=expected, do="write the file again")
    chunk_size = max(2**24 // array.shape[1], 1)  # rows that are checked at a time
    chunks = (array[start : start + chunk_size] for start in range(0, len(array), chunk_size))
    bad_rows = np.flatnonzero(np.concatenate([~np.isfinite(chunk).all(1) for chunk in chunks]))
    if len(bad_rows):
        row_list = ", ".join(map(str, bad_rows[:5])) + (", ..." if len(bad_rows) > 5 else "")
        raise InputError(
            f"{file} holds NaN or infinity in {len(bad_rows)} of {len(array)} rows ({row_list})",
            expected="finite numbers",
            do="correct these rows or leave them out",
        )
    return array


def open_pictures(file: Path, count: int) -> np.ndarray:
    """Return the images of a .npy file as uint8 (count, H, W, 1 or 3), memory-mapped."""
    images = open_images(file)
    if len(images) != count:
        raise InputError(
            f"{file} holds {len(images)} images",
            expected=f"{count}, one for each vector",
            do="write it again or remove it",
        )
    return images


def read_paths(file: Path, count: int) -> list[str] | None:
    """Return the paths in a JSON file, or None if there is no such file.

    Raises:
        InputError: if the file does not hold a list of `count` paths.
    """
    if not file.is_file():
        return None
    try:
        paths = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        paths = None
    is_list = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    if not is_list or len(paths) != count:
        raise InputError(
            f"{file} names {len(paths)} files" if is_list else f"{file} holds no list of files",
            expected=f"a JSON list of {count}, one for each vector",
            do="write it again or remove it",
        )
    return paths
