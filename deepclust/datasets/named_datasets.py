"""Data sets by name: kept as arrays in a folder, made from other files where that is missing, or embedded.

A data set's folder holds, for each split (train, test, unlabeled):

    SPLIT_images.npy    uint8 (M, H, W, channels), 1 or 3 channels, read memory-mapped
    SPLIT_labels.npy    int64 (M,), 0 to C - 1
    class_names.json    a list of C names; may be missing
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from deepclust.datasets.array_files import (
    check_channels,
    check_same_shape,
    open_images,
    open_labels,
    read_class_names,
)
from deepclust.datasets.conversion import class_files, make_once
from deepclust.datasets.image_sources import ArraySource, FileSource, ImageSet
from deepclust.errors import InputError


def load_arrays(
    *,
    folder: str,
    fit: Sequence[str],
    evaluate: Sequence[str] | None,
    extra: Sequence[str],
    channels: int,
    num_classes: int | None,
    make: Callable[[Path], None] | None,
) -> ImageSet:
    """The splits of a data set kept as arrays in `folder`, which `make` fills if it is missing or empty.

    `fit`, `evaluate` and `extra` name splits, joined in order; `evaluate=None` evaluates on the very images
    of `fit` (the merged protocol). Grey images are given out with `channels` equal channels. Only without
    `num_classes` may the labels be missing.

    Raises:
        InputError: a file is missing, is not what it should be, or does not fit the others.
    """
    place = Path(folder).expanduser().absolute()
    evaluated = list(fit if evaluate is None else evaluate)
    splits = list(dict.fromkeys([*fit, *evaluated, *extra]))
    if not filled(place):
        make_arrays(place, make, splits=splits, evaluated=evaluated, channels=channels)
    images = {split: open_images(place / f"{split}_images.npy") for split in splits}
    for split, array in images.items():
        check_same_shape(place / f"{split}_images.npy", array, images[splits[0]])
        check_channels(place / f"{split}_images.npy", array, channels)

    def source(names: Sequence[str]) -> ArraySource:
        return ArraySource([images[name] for name in names], channels)

    label_files = {split: place / f"{split}_labels.npy" for split in evaluated}
    labelled = num_classes is not None or any(file.exists() for file in label_files.values())
    fitted = source(fit)
    return ImageSet(
        fit=fitted,
        evaluation=fitted if evaluated == list(fit) else source(evaluated),
        extra=source(extra) if extra else None,
        labels=np.concatenate(
            [open_labels(file, len(images[split]), num_classes) for split, file in label_files.items()]
        )
        if labelled
        else None,
        class_names=read_class_names(place / "class_names.json", num_classes),
    )


def filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def make_arrays(
    folder: Path,
    make: Callable[[Path], None] | None,
    *,
    splits: Sequence[str],
    evaluated: Sequence[str],
    channels: int,
) -> None:
    """Fill a missing folder, or say which files to put there."""
    images = ", ".join(f"{split}_images.npy" for split in splits)
    labels = ", ".join(f"{split}_labels.npy" for split in evaluated)
    files = f"{images} (uint8, M x H x W x {channels}), {labels} (int64) and class_names.json in it"
    if make is None:
        raise InputError(f"{folder} is missing", expected=files, do="put these files there")
    try:
        make_once(folder, make, ready=filled)
    except InputError as error:
        raise InputError(
            f"{folder} is missing and could not be made, for {error.what}",
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

# For each of CIFAR-100's classes, by alphabet, its position above: the data set's own coarse labels.
# fmt: off
SUPERCLASS_OF = np.array([
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
    """The superclass, 0 to 19, of each of CIFAR-100's classes `fine`, 0 to 99; -1 (unknown) stays."""
    return np.where(fine < 0, -1, SUPERCLASS_OF[fine])


def load_cifar20(
    *,
    folder: str,
    cifar100: str,
    fit: Sequence[str],
    evaluate: Sequence[str] | None,
    channels: int,
    make: Callable[[Path], None] | None,
) -> ImageSet:
    """CIFAR-100 in its 20 superclasses, from `folder` if there is one, else from `cifar100`, labels mapped.

    The other arguments are those of `load_arrays`; `make` fills `cifar100`.
    """
    load = partial(load_arrays, fit=fit, evaluate=evaluate, extra=[], channels=channels)
    if filled(Path(folder).expanduser()):
        return load(folder=folder, num_classes=20, make=None)
    images = load(folder=cifar100, num_classes=100, make=make)
    assert images.labels is not None
    return replace(images, labels=cifar100_superclass(images.labels), class_names=list(SUPERCLASSES))


def load_embedded_digits() -> ImageSet:
    """scikit-learn's 1,797 images of 8 x 8: values 0 to 16 as 0 to 255, one channel, ten classes."""
    from sklearn.datasets import load_digits  # takes seconds, and no other data set needs it

    digits = load_digits()
    source = ArraySource([np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]])
    names = [str(digit) for digit in range(10)]
    return ImageSet(source, source, labels=digits.target.astype(np.int64), class_names=names)


# Files that stay files --------------------------------------------------------------------------------------


def load_class_folders(
    *,
    folder: str,
    root: str | None,
    fit: Sequence[str],
    evaluate: Sequence[str] | None,
    image_size: int,
    channels: int,
    num_classes: int,
    num_workers: int,
) -> ImageSet:
    """The image files ROOT/SPLIT/CLASS/**/FILE, decoded at `image_size` each time they are read.

    They are searched for once: `folder` keeps the lists for as long as `root` is the same. Remove it when
    files were added or removed.

    Raises:
        InputError: a folder is missing, or there are not `num_classes` classes, the same in all splits.
    """
    place = Path(folder).expanduser().absolute()
    root = None if root is None else str(Path(root).expanduser().absolute())
    evaluated = list(fit if evaluate is None else evaluate)
    splits = list(dict.fromkeys([*fit, *evaluated]))

    def make(work: Path) -> None:
        lists, names = {}, None
        for split in splits:
            paths, labels, here = class_files(root, split, classes=None, num_classes=num_classes)
            if here != (names or here):
                raise InputError(
                    f"the class folders of {split} and {splits[0]} in {root} have different names",
                    expected="the same in every split",
                    do="set dataset.root=DIR to a complete copy",
                )
            lists[split], names = {"paths": paths, "labels": labels.tolist()}, here
        index = {"root": root, "class_names": names, "splits": lists}
        (work / "files.json").write_text(json.dumps(index))

    def ready(here: Path) -> bool:
        if not (here / "files.json").is_file():
            return False
        index = json.loads((here / "files.json").read_text())
        return index["root"] == root and set(splits) <= set(index["splits"])

    make_once(place, make, ready=ready)
    index = json.loads((place / "files.json").read_text())

    def listed(names: Sequence[str], what: str) -> list:
        return [item for name in names for item in index["splits"][name][what]]

    def source(names: Sequence[str]) -> FileSource:
        paths = listed(names, "paths")
        return FileSource(paths, image_size=image_size, channels=channels, num_workers=num_workers)

    fitted = source(fit)
    return ImageSet(
        fit=fitted,
        evaluation=fitted if evaluated == list(fit) else source(evaluated),
        labels=np.array(listed(evaluated, "labels"), np.int64),
        class_names=index["class_names"],
        paths=listed(evaluated, "paths"),
    )
