"""Data sets of vectors in place of images: features written by `deepclust features`, or a table of your own.

Their folder holds, for each split (train, test):

    SPLIT_features.npy   float32 (M, D), read memory-mapped
    SPLIT_labels.npy     int64 (M,); may be missing
    SPLIT_images.npy     uint8 (M, H, W, 1 or 3), the images that the vectors were made of; may be missing
    SPLIT_shapes.npy     of images in their own shapes; see `deepclust.datasets.named_datasets`
    SPLIT_thumbnails.bin small pictures in place of SPLIT_images.npy; see `deepclust.datasets.thumbnails`
    SPLIT_paths.json     a list of M files that the vectors were made of; may be missing
    class_names.json     a list of C names; may be missing
"""

from pathlib import Path

import numpy as np

from deepclust.datasets.array_files import open_array, open_labels, open_npy, open_stored_images, read_class_names
from deepclust.datasets.image_sources import ImageSet, ImageSource, VectorSource
from deepclust.datasets.labels import number_classes
from deepclust.datasets.sampled_rows import draw_sample
from deepclust.datasets.thumbnails import open_thumbnails
from deepclust.engine.small_files import MAX_BYTES_OF_LIST, read_json
from deepclust.errors import InputError
from deepclust.number_types import AnyInt, PositiveInt


def load_features(
    *, path: str, num_classes: PositiveInt | None, max_fitted: PositiveInt | None = None, seed: AnyInt = 0
) -> ImageSet:
    """Load the vectors of a folder: the split train is fitted, and test is evaluated if it exists, else train.

    Of more than `max_fitted` vectors to fit, so many are drawn by the seed; all are evaluated.

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
        fit=draw_sample(fit, max_fitted, seed=seed),
        evaluation=fit if evaluated_split == "train" else VectorSource([test]),
        labels=labels,
        class_names=class_names,
        paths=read_paths(folder / f"{evaluated_split}_paths.json", len(test)),
        pictures=open_pictures(folder, evaluated_split, len(test))
        if pictures.is_file()
        else open_thumbnails(folder, evaluated_split, len(test)),
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
    if len(bad_rows := find_rows_not_finite(array)):
        raise rows_not_finite_error(str(file), bad_rows, len(array))
    return array


def find_rows_not_finite(array: np.ndarray) -> np.ndarray:
    """Return the indices of the rows of vectors (M, D) that hold NaN or infinity."""
    chunk_size = max(2**24 // array.shape[1], 1)  # rows that are checked at a time
    chunks = (array[start : start + chunk_size] for start in range(0, len(array), chunk_size))
    return np.flatnonzero(np.concatenate([~np.isfinite(chunk).all(1) for chunk in chunks]))


def rows_not_finite_error(name: str, bad_rows: np.ndarray, num_rows: int) -> InputError:
    """Return the error for rows that hold NaN or infinity."""
    row_list = ", ".join(map(str, bad_rows[:5])) + (", ..." if len(bad_rows) > 5 else "")
    return InputError(
        f"{name} holds NaN or infinity in {len(bad_rows)} of {num_rows} rows ({row_list})",
        expected="finite numbers",
        do="correct these rows or leave them out",
    )


def convert_vectors(array: np.ndarray, name: str) -> np.ndarray:
    """Return vectors (M, D) of any type of real number as float32; `name` is what errors call them.

    Raises:
        InputError: if they are no such table, or not all numbers are finite as float32.
    """
    array = np.asarray(array)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiub":
        raise InputError(
            f"{name} holds {array.dtype} {array.shape}",
            expected="vectors: numbers of the shape (rows, numbers of a row)",
            do="bring them into this form, for example with numpy.asarray(X, dtype='float32')",
        )
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(array, np.float32)
    if len(bad_rows := find_rows_not_finite(vectors)):
        raise rows_not_finite_error(name, bad_rows, len(vectors))
    return vectors


def read_vector_file(file: Path) -> np.ndarray:
    """Return the vectors (M, D) of a .npy or .npz file as float32; a .npz file holds one array, or one named `images`.

    Raises:
        InputError: if the file is missing, cannot be read, or holds something else.
    """
    return convert_vectors(open_array(file)["images"], str(file))


def read_vector_folder(folder: Path) -> tuple[np.ndarray, list[str] | None]:
    """Return the vectors (M, D) of a folder of the layout above, and the files that they were made of, if known.

    They are those of the split test where there is one, else of train.

    Raises:
        InputError: if the folder holds neither, or something else.
    """
    for split in ("test", "train"):
        file = folder / f"{split}_features.npy"
        if file.is_file():
            vectors = open_vectors(file)
            return vectors, read_paths(folder / f"{split}_paths.json", len(vectors))
    raise InputError(
        f"{folder} holds neither test_features.npy nor train_features.npy",
        expected="vectors, float32 (M, D)",
        do="give one of its files these names, or name the file itself",
    )


def open_pictures(folder: Path, split: str, count: int) -> ImageSource:
    """Open the images that the vectors of a split were made of."""
    images = open_stored_images(folder, [split], channels=None)
    if len(images) != count:
        raise InputError(
            f"{folder / f'{split}_images.npy'} holds {len(images)} images",
            expected=f"{count}, one for each vector",
            do="write it again or remove it",
        )
    return images


def read_paths(file: Path, count: int) -> list[str] | None:
    """Return the paths in a JSON file, or None if there is no such file.

    Raises:
        InputError: if the file does not hold a list of `count` paths.
    """
    if not file.exists():
        return None
    try:
        paths = read_json(file, max_bytes=MAX_BYTES_OF_LIST)
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
