"""A data set from a folder of image files, which are decoded once into an array that is read memory-mapped."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.datasets.array_files import open_images
from deepclust.datasets.conversion import (
    decode_readable_images,
    make_folder_once,
    write_image_array,
    write_unreadable_list,
)
from deepclust.datasets.image_decoding import find_image_files, find_value_ranges
from deepclust.datasets.image_formats import USUAL_SUFFIXES, describe_passed_over
from deepclust.datasets.image_sources import ArraySource, ImageSet
from deepclust.datasets.value_ranges import ValueRanges, check_ranges, describe_ranges, list_some
from deepclust.errors import InputError
from deepclust.number_types import PositiveFloat, PositiveInt

logger = logging.getLogger(__name__)


def load_folder(
    *,
    path: str,
    data_dir: str,
    image_size: PositiveInt,
    channels: PositiveInt,
    labelled: bool,
    value_ranges: ValueRanges | None = None,
    max_megapixels: PositiveFloat | None = None,
) -> ImageSet:
    """Load all image files below `path`, at any depth, sorted by path; they are both fitted and evaluated.

    The images, as `decode_image` gives them, are stored in <data_dir>/folder-<hash of path, size and channels>. This
    folder holds train_images.npy, files.json (paths, sizes and modification times, value ranges) and, if some files
    cannot be read, unreadable.txt with their names and the reasons. The stored images are used until a file is added,
    removed or changed.

    Values of more than 8 bits are scaled by `value_ranges`; where those say nothing, by what `find_value_ranges` finds
    in all files together.

    `max_megapixels` is the largest image that is read, in millions of pixels as they are decoded (see `open_image`);
    None, as in runs that know no limit, is Pillow's own.

    With `labelled`, the first sub-folder of `path` that leads to a file is its class; files directly in `path` have
    none (-1). Grey images are stored with three channels unless `channels` is 1.

    Raises:
        InputError: if there is no such folder, no readable image in it, no sub-folder although `labelled`, or a range
            is none.
    """
    given_ranges = check_ranges(value_ranges)
    root = Path(path).expanduser().absolute()
    files = find_images(root)
    conversion = {"format": 1, "path": str(root), "image_size": image_size, "channels": channels}
    key = hashlib.sha256(json.dumps(conversion).encode()).hexdigest()[:10]
    folder = Path(data_dir).expanduser().absolute() / f"folder-{key}"

    def make(work: Path) -> None:
        names = [name for name, _, _ in files]
        ranges, outside = find_value_ranges(
            [str(root / name) for name in names], given_ranges, max_megapixels=max_megapixels
        )
        unreadable = store_images(work, root, names, image_size, channels, ranges, max_megapixels)
        index = {**conversion, "files": files, "unreadable": unreadable, "value_ranges": ranges}
        index["max_megapixels"] = max_megapixels
        index |= {"given_value_ranges": given_ranges, "outside": [str(Path(p).relative_to(root)) for p in outside]}
        (work / "files.json").write_text(json.dumps(index))

    def is_up_to_date(folder: Path) -> bool:
        index = read_index(folder) if (folder / "files.json").is_file() else {}
        known_ranges = [check_ranges(index.get(key)) for key in ("given_value_ranges", "value_ranges") if key in index]
        # With another limit, files that could not be read are tried again.
        is_read_alike = not index.get("unreadable") or index.get("max_megapixels") == max_megapixels
        return index.get("files") == files and given_ranges in known_ranges and is_read_alike

    make_folder_once(folder, make, ready=is_up_to_date)
    index = read_index(folder)
    found_ranges = check_ranges(index["value_ranges"])
    unreadable_names = {name for name, _ in index["unreadable"]}
    names = [name for name, _, _ in files if name not in unreadable_names]
    logger.info("%d images of %s, stored in %s", len(names), root, folder)
    if unreadable_names:
        logger.warning(
            "%d of %d image files in %s could not be read and are left out; %s lists them (the first: %s)",
            *(len(unreadable_names), len(files), root, folder / "unreadable.txt", index["unreadable"][0][1]),
        )
    if found_ranges:
        logger.info("values of more than 8 bits are scaled to 0 to 255: %s", describe_ranges(found_ranges))
    if index["outside"]:
        logger.warning(
            "%d of %d image files in %s hold values outside this range, which are clipped: %s",
            *(len(index["outside"]), len(files), root, list_some(index["outside"])),
        )
    source = ArraySource([open_images(folder / "train_images.npy")])
    labels, class_names = subfolder_labels(root, names) if labelled else (None, None)
    paths = [str(root / name) for name in names]
    return ImageSet(
        source, source, labels=labels, class_names=class_names, paths=paths, value_ranges=found_ranges or None
    )


def find_images(root: Path) -> list[list[Any]]:
    """Return [path below root, size in bytes, modification time in ns] of every image file.

    Raises:
        InputError: if there is no such folder, it cannot be searched, or it holds no image file.
    """
    if not root.is_dir():
        raise InputError(
            f"{root} is {'a file' if root.exists() else 'missing'}",
            expected="a folder of images",
            do="set dataset.path=DIR" + (", or dataset=arrays for an array file" if root.is_file() else ""),
        )
    try:
        files, other_counts = find_image_files(root)
    except OSError as error:
        raise InputError(
            f"{root} cannot be searched: {error}",
            expected="folders that can be listed",
            do="change their permissions or set another dataset.path=DIR",
        ) from error
    if other_counts:
        logger.info(
            "%d files in %s are passed over: %s", other_counts.total(), root, describe_passed_over(other_counts)
        )
    if not files:
        raise InputError(
            f"{root} holds no image file" + (f" (but {describe_passed_over(other_counts)})" if other_counts else ""),
            expected=f"files ending in {' '.join(USUAL_SUFFIXES)}, or in another format that Pillow reads",
            do="set dataset.path=DIR to a folder of images",
        )
    return [list(file) for file in files]


def store_images(
    work: Path,
    root: Path,
    names: list[str],
    image_size: int,
    channels: int,
    value_ranges: ValueRanges,
    max_megapixels: float | None,
) -> list[tuple[str, str]]:
    """Decode the files `names` below `root` and store them in the folder `work`.

    Returns:
        (name, reason) of the files that cannot be read.

    Raises:
        InputError: if no file can be read.
    """
    failed: list[tuple[str, str]] = []
    paths = [str(root / name) for name in names]
    chunks = decode_readable_images(
        paths,
        failed,
        image_size=image_size,
        channels=channels,
        value_ranges=value_ranges,
        max_megapixels=max_megapixels,
    )
    shape = (image_size, image_size, channels)
    if not write_image_array(work / "train_images.npy", chunks, shape=shape, total=len(paths)):
        raise InputError(
            f"none of the {len(paths)} image files in {root} can be read (the first: {name_key(failed[0][1])})",
            expected="at least one image",
            do="set dataset.path=DIR to a folder of undamaged images",
        )
    unreadable = [(str(Path(path).relative_to(root)), name_key(reason)) for path, reason in failed]
    if unreadable:
        write_unreadable_list(work, unreadable)
    return unreadable


def name_key(reason: str) -> str:
    """Return why a file cannot be read, with the key of the limit as it is written for a data set."""
    return reason.replace("max_megapixels", "dataset.max_megapixels")


def read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "files.json").read_text())


def subfolder_labels(root: Path, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return labels (M,) by the first folder of each path, -1 for files without one, and the folder names, sorted."""
    folders = [Path(name).parts[0] if len(Path(name).parts) > 1 else None for name in names]
    classes = sorted({folder for folder in folders if folder is not None})
    if not classes:
        raise InputError(
            f"dataset.labelled is true and {root} has no sub-folder with images",
            expected="a sub-folder for each class",
            do="set dataset.labelled=false",
        )
    label_of = {folder: label for label, folder in enumerate(classes)}
    return np.array([-1 if folder is None else label_of[folder] for folder in folders], np.int64), classes
