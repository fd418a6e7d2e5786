"""Vectors in place of images: features that `deepclust features` has kept, or a table of your own.

A folder of them holds, for each split (train, test):

    SPLIT_features.npy   float32 (M, D), read memory-mapped
    SPLIT_labels.npy     int64 (M,), may be missing
    SPLIT_images.npy     uint8 (M, H, W, 1 or 3), what the rows look like; may be missing
    SPLIT_paths.json     a list of M files that the rows come from; may be missing
    class_names.json     a list of C names; may be missing
"""

import json
from pathlib import Path

import numpy as np

from deepclust.datasets.array_files import open_images, open_labels, open_npy, read_class_names
from deepclust.datasets.image_sources import ArraySource, ImageSet, VectorSource
from deepclust.errors import InputError


def load_features(*, path: str, num_classes: int | None) -> ImageSet:
    """The vectors of a folder: fitted on train; evaluated on test where there is one, else on train.

    Raises:
        InputError: a file is missing, is not what it should be, or does not fit the others.
    """
    folder = Path(path).expanduser()
    if not (folder / "train_features.npy").is_file():
        raise InputError(
            f"{folder} holds no train_features.npy",
            expected="vectors, float32 (M, D)",
            do="make them with deepclust features, or write a table there with numpy.save",
        )
    evaluated = "test" if (folder / "test_features.npy").is_file() else "train"
    train = open_vectors(folder / "train_features.npy")
    test = train if evaluated == "train" else open_vectors(folder / "test_features.npy")
    if train.shape[1] != test.shape[1]:
        raise InputError(
            f"the vectors of train have {train.shape[1]} numbers, those of test {test.shape[1]}",
            expected="as many in both",
            do="make the files anew",
        )
    fit = VectorSource([train])
    labels, pictures = folder / f"{evaluated}_labels.npy", folder / f"{evaluated}_images.npy"
    return ImageSet(
        fit=fit,
        evaluation=fit if evaluated == "train" else VectorSource([test]),
        labels=open_labels(labels, len(test), num_classes) if labels.is_file() else None,
        class_names=read_class_names(folder / "class_names.json", num_classes),
        paths=read_paths(folder / f"{evaluated}_paths.json", len(test)),
        pictures=ArraySource([open_pictures(pictures, len(test))]) if pictures.is_file() else None,
        name=folder.absolute().name,
    )


def open_vectors(file: Path) -> np.ndarray:
    """Vectors float32 (M, D) of a .npy file, memory-mapped; all are read once.

    Raises:
        InputError: where it holds something else, or numbers that are not finite.
    """
    expected = "float32 (rows, numbers)"
    array = open_npy(file, expected)
    if array.dtype != np.float32 or array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{file} holds {array.dtype} {array.shape}", expected=expected, do="write the file anew")
    size = max(2**24 // array.shape[1], 1)  # rows at once
    parts = [~np.isfinite(array[start : start + size]).all(1) for start in range(0, len(array), size)]
    bad = np.flatnonzero(np.concatenate(parts))
    if len(bad):
        named = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise InputError(
            f"{file} holds NaN or infinity in {len(bad)} of {len(array)} rows ({named})",
            expected="finite numbers",
            do="mend these rows or leave them out",
        )
    return array


def open_pictures(file: Path, count: int) -> np.ndarray:
    """Images uint8 (count, H, W, 1 or 3) of a .npy file, memory-mapped."""
    images = open_images(file)
    if len(images) != count:
        raise InputError(
            f"{file} holds {len(images)} pictures", expected=f"{count}, one a row", do="make it anew or remove it"
        )
    return images


def read_paths(file: Path, count: int) -> list[str] | None:
    """The paths in a JSON file; None where there is no such file.

    Raises:
        InputError: unless they are `count`.
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
            expected=f"a JSON list of {count}, one a row",
            do="make it anew or remove it",
        )
    return paths
