"""Data sets with a configuration of their own: arrays in a folder, folders of image files, embedded digits.

A folder of arrays is made from the original files of the data set if it is missing. It holds, for each split (train,
test, unlabeled):

    SPLIT_images.npy    uint8 (M, H, W, channels), 1 or 3 channels, read memory-mapped; or, of whole images in their
                        own shapes, uint8 (P, channels), their pixels image after image: row by row, or column by
                        column where the image is taller than wide
    SPLIT_shapes.npy    integers (M, 2), height and width of each image; only of whole images
    SPLIT_labels.npy    int64 (M,), 0 to C - 1
    class_names.json    a list of C names; may be missing
    value_ranges.json   the values of black and white in files of more than 8 bits; missing where there were none
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.datasets.array_files import open_labels, open_stored_images, read_class_names
from deepclust.datasets.image_decoding import Kept, StoredSize, find_value_ranges
from deepclust.datasets.image_sources import ArraySource, FileSource, ImageSet
from deepclust.datasets.labels import number_classes
from deepclust.datasets.one_time_conversion import find_class_files, has_entries, make_folder_once
from deepclust.datasets.value_ranges import check_ranges, read_ranges
from deepclust.engine.small_files import MAX_BYTES_OF_LIST, read_json_object
from deepclust.errors import InputError
from deepclust.number_types import PositiveInt


def load_arrays(
    *,
    folder: str,
    fit: Sequence[str],
    evaluate: Sequence[str] | None,
    extra: Sequence[str],
    channels: PositiveInt,
    num_classes: PositiveInt | None,
    make: Callable[[Path], None] | None,
) -> ImageSet:
    """Load a data set that is kept as arrays in `folder`; `make` fills this folder if it is missing or empty.

    Args:
        folder: holds the arrays.
        fit: splits that are fitted, joined in order.
        evaluate: splits that are evaluated; None evaluates the images of `fit` (the merged protocol).
        extra: splits of unlabelled images that only help the representation.
        channels: channels of the images as they are read; with 3, grey images have three equal channels.
        num_classes: number of classes (see `number_classes`). Only if it is None may the labels be missing.
        make: fills an empty folder with the arrays; None if they cannot be made.

    Raises:
        InputError: if a file is missing, holds something else, or does not fit the others.
    """
    array_folder = Path(folder).expanduser().absolute()
    evaluated_splits = list(fit if evaluate is None else evaluate)
    splits = list(dict.fromkeys([*fit, *evaluated_splits, *extra]))
    if not has_entries(array_folder):
        make_missing_arrays(array_folder, make, splits=splits, evaluated_splits=evaluated_splits, channels=channels)
    make_source = partial(open_stored_images, array_folder, channels=channels)
    make_source(splits)  # checks that they go together
    counts = {split: len(make_source([split])) for split in splits}

    label_files = {split: array_folder / f"{split}_labels.npy" for split in evaluated_splits}
    has_labels = num_classes is not None or any(file.exists() for file in label_files.values())
    labels, class_names = None, read_class_names(array_folder / "class_names.json", num_classes)
    if has_labels:
        labels, class_names = number_classes(
            {file: open_labels(file, counts[split]) for split, file in label_files.items()},
            num_classes=num_classes,
            class_names=class_names,
        )
    fit_source = make_source(fit)
    return ImageSet(
        fit=fit_source,
        evaluation=fit_source if evaluated_splits == list(fit) else make_source(evaluated_splits),
        extra=make_source(extra) if extra else None,
        labels=labels,
        class_names=class_names,
        value_ranges=read_ranges(array_folder),
    )


def make_missing_arrays(
    folder: Path,
    make: Callable[[Path], None] | None,
    *,
    splits: Sequence[str],
    evaluated_splits: Sequence[str],
    channels: int,
) -> None:
    """Fill a missing folder by calling `make`.

    Raises:
        InputError: if that is not possible; it names the files to put there.
    """
    images = ", ".join(f"{split}_images.npy" for split in splits)
    labels = ", ".join(f"{split}_labels.npy" for split in evaluated_splits)
    files = f"{images} (uint8, M x H x W x {channels}), {labels} (int64) and class_names.json in it"
    if make is None:
        raise InputError(f"{folder} is missing", expected=files, do="put these files there")
    try:
        make_folder_once(folder, make, ready=has_entries)
    except InputError as error:
        raise InputError(
            f"{folder} is missing and could not be made: {error.what}",
            expected=files,
            do=f"{error.do}, or put these files there",
        ) from error


# Derived and embedded ---------------------------------------------------------------------------------------

SUPERCLASSES = (
    "aquatic_mammals",
    "fish",
    "flowers",
    "food_containers",
    "fruit_and_vegetables",
    "household_electrical_devices",
    "household_furniture",
    "insects",
    "large_carnivores",
    "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores",
    "medium_mammals",
    "non-insect_invertebrates",
    "people",
    "reptiles",
    "small_mammals",
    "trees",
    "vehicles_1",
    "vehicles_2",
)

# For each class of CIFAR-100, in alphabetical order, the position of its superclass above: the coarse labels that come
# with the data set.
# fmt: off
SUPERCLASS_OF_CLASS = np.array([
     4,  1, 14,  8,  0,  6,  7,  7, 18,  3,
     3, 14,  9, 18,  7, 11,  3,  9,  7, 11,
     6, 11,  5, 10,  7,  6, 13, 15,  3, 15,
     0, 11,  1, 10, 12, 14, 16,  9, 11,  5,
     5, 19,  8,  8, 15, 13, 14, 17, 18, 10,
    16,  4, 17,  4,  2,  0, 17,  4, 18, 17,
    10,  3,  2, 12, 12, 16, 12,  1,  9, 19,
     2, 10,  0,  1, 16, 12,  9, 13, 15, 13,
    16, 19,  2,  4,  6, 19,  5,  5,  8, 19,
    18,  1,  2, 15,  6,  0, 17,  8, 14, 13,
])
# fmt: on


def cifar100_superclass(fine: np.ndarray) -> np.ndarray:
    """Return the superclass, 0 to 19, of each label `fine`, 0 to 99, of CIFAR-100; -1 (unknown) stays."""
    return np.where(fine < 0, -1, SUPERCLASS_OF_CLASS[fine])


def load_cifar20(
    *,
    folder: str,
    cifar100: str,
    fit: Sequence[str],
    evaluate: Sequence[str] | None,
    channels: PositiveInt,
    make: Callable[[Path], None] | None,
) -> ImageSet:
    """Load CIFAR-100 with its 20 superclasses as classes.

    If `folder` exists, it holds the data set. Otherwise the images are those in the folder `cifar100`, with mapped
    labels. The other arguments are those of `load_arrays`; `make` fills `cifar100`.
    """
    load = partial(load_arrays, fit=fit, evaluate=evaluate, extra=[], channels=channels)
    if has_entries(Path(folder).expanduser()):
        return load(folder=folder, num_classes=20, make=None)
    images = load(folder=cifar100, num_classes=100, make=make)
    assert images.labels is not None
    return replace(images, labels=cifar100_superclass(images.labels), class_names=list(SUPERCLASSES))


def load_embedded_digits() -> ImageSet:
    """Load scikit-learn's 1,797 digits of 8 x 8 pixels in ten classes; their values 0 to 16 are scaled to 0 to 255."""
    from sklearn.datasets import load_digits  # imported here because it takes seconds and no other data set needs it

    digits = load_digits()
    source = ArraySource([np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]])
    names = [str(digit) for digit in range(10)]
    return ImageSet(source, source, labels=digits.target.astype(np.int64), class_names=names)


JPEG_SUFFIXES = (".jpeg", ".jpg")  # of 8 bits: ImageNet's files need not be opened to know the range of their values

# Image files that are not converted -------------------------------------------------------------------------


def load_class_folders(
    *,
    folder: str,
    root: str | None,
    fit: Sequence[str],
    evaluate: Sequence[str] | None,
    image_size: StoredSize,
    channels: PositiveInt,
    num_classes: PositiveInt,
    num_workers: PositiveInt,
    keep: Kept = "central_squares",
) -> ImageSet:
    """Load the image files ROOT/SPLIT/CLASS/**/FILE, which are decoded each time they are read.

    Their short side is `image_size` then; `keep` says whether whole images are read, or squares.

    The files are searched for once. Their list is kept in `folder` and used as long as `root` is the same; remove it
    when files have been added or removed.

    Raises:
        InputError: if a folder is missing, or the splits do not have the same `num_classes` classes.
    """
    list_folder = Path(folder).expanduser().absolute()
    root = None if root is None else str(Path(root).expanduser().absolute())
    evaluated_splits = list(fit if evaluate is None else evaluate)
    splits = list(dict.fromkeys([*fit, *evaluated_splits]))

    def make(work: Path) -> None:
        files_by_split, class_names = {}, None
        for split in splits:
            paths, labels, split_names = find_class_files(root, split, classes=None, num_classes=num_classes)
            if split_names != (class_names or split_names):
                raise InputError(
                    f"the class folders of {split} and {splits[0]} in {root} have different names",
                    expected="the same in every split",
                    do="set dataset.root=DIR to a complete copy",
                )
            files_by_split[split], class_names = {"paths": paths, "labels": labels.tolist()}, split_names
        paths = [path for files in files_by_split.values() for path in files["paths"]]
        others = [path for path in paths if not path.lower().endswith(JPEG_SUFFIXES)]
        ranges, _ = find_value_ranges(others, None)
        index = {"root": root, "class_names": class_names, "splits": files_by_split, "value_ranges": ranges}
        (work / "files.json").write_text(json.dumps(index))

    def is_up_to_date(folder: Path) -> bool:
        index = read_index(folder)
        return index.get("root") == root and set(splits) <= set(index.get("splits", ()))

    make_folder_once(list_folder, make, ready=is_up_to_date, replaceable=["files.json"])
    index = read_index(list_folder)
    ranges = check_ranges(index.get("value_ranges"))

    def join_lists(splits: Sequence[str], key: str) -> list:
        return [item for split in splits for item in index["splits"][split][key]]

    def make_source(splits: Sequence[str]) -> FileSource:
        paths = join_lists(splits, "paths")
        form: dict[str, Any] = {"image_size": image_size, "channels": channels, "keep": keep, "value_ranges": ranges}
        return FileSource(paths, num_workers=num_workers, **form)

    fit_source = make_source(fit)
    return ImageSet(
        fit=fit_source,
        evaluation=fit_source if evaluated_splits == list(fit) else make_source(evaluated_splits),
        labels=np.array(join_lists(evaluated_splits, "labels"), np.int64),
        class_names=index["class_names"],
        paths=join_lists(evaluated_splits, "paths"),
        value_ranges=ranges or None,
    )


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of files.json; an empty dictionary where `load_class_folders` has not written it."""
    index = read_json_object(folder / "files.json", max_bytes=MAX_BYTES_OF_LIST)
    try:
        for files in index["splits"].values():
            paths, labels = files["paths"], files["labels"]
            if len(paths) != len(labels) or {*map(type, paths)} != {str} or {*map(type, labels)} != {int}:
                return {}
        check_ranges(index.get("value_ranges"))
        return index if all(isinstance(name, str) for name in index["class_names"]) else {}
    except (KeyError, TypeError, ValueError, AttributeError):  # InputError is a ValueError
        return {}
