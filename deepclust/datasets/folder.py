"""A data set from a folder of image files, which are decoded once into an array that is read memory-mapped."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.datasets.array_files import open_stored_images
from deepclust.datasets.image_decoding import Kept, StoredSize, check_kept, find_image_files, find_value_ranges
from deepclust.datasets.image_formats import USUAL_SUFFIXES, describe_passed_over
from deepclust.datasets.image_lists import is_image_list, read_image_list
from deepclust.datasets.image_sources import ImageSet
from deepclust.datasets.input_paths import check_image_folder
from deepclust.datasets.one_time_conversion import (
    decode_readable_images,
    make_folder_once,
    write_images,
    write_unreadable_list,
)
from deepclust.datasets.value_ranges import ValueRanges, check_ranges, describe_ranges, list_some
from deepclust.engine.plurals import format_count
from deepclust.engine.progress_bar import announce
from deepclust.engine.small_files import MAX_BYTES_OF_LIST, read_json_object
from deepclust.errors import InputError
from deepclust.number_types import PositiveFloat, PositiveInt

logger = logging.getLogger(__name__)


def load_folder(
    *,
    path: str,
    data_dir: str,
    image_size: StoredSize,
    channels: PositiveInt,
    labelled: bool,
    keep: Kept = "central_squares",
    value_ranges: ValueRanges | None = None,
    max_megapixels: PositiveFloat | None = None,
) -> ImageSet:
    """Load all image files below `path`, at any depth, sorted by path; they are both fitted and evaluated.

    `path` may also be a text file with the path of an image on each line, whose order is kept.

    The images, as `decode_image` gives them, are stored in <data_dir>/folder-<hash of path, size, channels and `keep`>.
    This folder holds train_images.npy, of whole images train_shapes.npy too, files.json (paths, sizes and modification
    times, value ranges) and, if some files cannot be read, unreadable.txt with their names and the reasons. The stored
    images are used until a file is added, removed or changed.

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
    check_kept(image_size, keep)
    given_ranges = check_ranges(value_ranges)
    root = Path(path).expanduser().absolute()
    files = find_images(root)
    conversion: dict[str, Any] = {"format": 1, "path": str(root), "image_size": image_size, "channels": channels}
    if keep != "central_squares":  # not named for these, so that folders that are there stay in use
        conversion["keep"] = keep
    key = hashlib.sha256(json.dumps(conversion).encode()).hexdigest()[:10]
    folder = Path(data_dir).expanduser().absolute() / f"folder-{key}"

    def make(work: Path) -> None:
        names = [name for name, _, _ in files]
        with announce("looking at the image files"):
            ranges, outside = find_value_ranges(
                [str(root / name) for name in names], given_ranges, max_megapixels=max_megapixels
            )
        unreadable = store_images(work, root, names, image_size, channels, keep, ranges, max_megapixels)
        index = {**conversion, "files": files, "unreadable": unreadable, "value_ranges": ranges}
        index["max_megapixels"] = max_megapixels
        index |= {"given_value_ranges": given_ranges, "outside": [name_below(root, path) for path in outside]}
        (work / "files.json").write_text(json.dumps(index))

    def is_up_to_date(folder: Path) -> bool:
        index = read_index(folder)
        known_ranges = [check_ranges(index.get(key)) for key in ("given_value_ranges", "value_ranges") if key in index]
        # With another limit, files that could not be read are tried again.
        is_read_alike = not index.get("unreadable") or index.get("max_megapixels") == max_megapixels
        return index.get("files") == files and given_ranges in known_ranges and is_read_alike

    written = ["files.json", "train_images.npy", "train_shapes.npy", "unreadable.txt"]
    make_folder_once(folder, make, ready=is_up_to_date, replaceable=written)
    index = read_index(folder)
    found_ranges = check_ranges(index["value_ranges"])
    reasons = dict(index["unreadable"])
    unreadable = [(row, str(root / name), reasons[name]) for row, (name, _, _) in enumerate(files) if name in reasons]
    names = [name for name, _, _ in files if name not in reasons]
    logger.info("%s of %s, stored in %s", format_count(len(names), "image"), root, folder)
    log_what_was_found(root, len(files), index["unreadable"], folder / "unreadable.txt", found_ranges, index["outside"])
    source = open_stored_images(folder, ["train"], channels=None)
    labels, class_names = subfolder_labels(root, names) if labelled else (None, None)
    paths = [str(root / name) for name in names]
    return ImageSet(
        source,
        source,
        labels=labels,
        class_names=class_names,
        paths=paths,
        value_ranges=found_ranges or None,
        unreadable=unreadable,
    )


def log_what_was_found(
    root: Path,
    num_files: int,
    unreadable: Sequence[Sequence[str]],
    unreadable_list: Path,
    value_ranges: ValueRanges,
    outside: Sequence[str],
) -> None:
    """Log which files are left out (name, reason), and the ranges of values with the files that go beyond them."""
    if unreadable:
        logger.warning(
            "%d of %d image files in %s could not be read and are left out; %s lists them (the first: %s)",
            *(len(unreadable), num_files, root, unreadable_list, unreadable[0][1]),
        )
    if value_ranges:
        logger.info("values of more than 8 bits are scaled to 0 to 255: %s", describe_ranges(value_ranges))
    if outside:
        logger.warning(
            "%d of %d image files in %s hold values outside this range, which are clipped: %s",
            *(len(outside), num_files, root, list_some(outside)),
        )


def find_images(root: Path) -> list[list[Any]]:
    """Return [path below root, size in bytes, modification time in ns] of every image file.

    Files that a list names have absolute paths; one that is missing has the size 0.

    Raises:
        InputError: if there is no such folder or list, it cannot be searched, or it holds no image file.
    """
    if is_image_list(root):
        return [[path, *read_size_and_time(path)] for path in read_image_list(root)]
    check_image_folder(root)
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
            "%s in %s passed over: %s",
            *(format_count(other_counts.total(), "file"), root, describe_passed_over(other_counts)),
        )
    if not files:
        raise InputError(
            f"{root} holds no image file" + (f" (but {describe_passed_over(other_counts)})" if other_counts else ""),
            expected=f"files ending in {' '.join(USUAL_SUFFIXES)}, or in another format that Pillow reads",
            do="set dataset.path=DIR to a folder of images",
        )
    return [list(file) for file in files]


def read_size_and_time(path: str) -> tuple[int, int]:
    """Return size in bytes and modification time in ns of a file; zeros if it is missing, as reading will tell."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def name_below(root: Path, path: str) -> str:
    """Return the path of a file below the folder `root`; that of a file of a list as it is."""
    return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else path


def store_images(
    work: Path,
    root: Path,
    names: list[str],
    image_size: StoredSize,
    channels: int,
    keep: Kept,
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
        keep=keep,
        value_ranges=value_ranges,
        max_megapixels=max_megapixels,
    )
    form: dict[str, Any] = {"image_size": image_size, "channels": channels, "keep": keep}
    if not write_images(work, "train", chunks, total=len(paths), **form):
        raise none_readable_error(root, len(paths), failed[0][1])
    unreadable = [(name_below(root, path), name_key(reason)) for path, reason in failed]
    if unreadable:
        write_unreadable_list(work, unreadable)
    return unreadable


def none_readable_error(root: Path, num_files: int, first_reason: str) -> InputError:
    """Return the error for a folder of which no image file can be read."""
    return InputError(
        f"none of the {num_files} image files in {root} can be read (the first: {name_key(first_reason)})",
        expected="at least one image",
        do="set dataset.path=DIR to a folder of undamaged images",
    )


def name_key(reason: str) -> str:
    """Return why a file cannot be read, with the key of the limit as it is written for a data set."""
    return reason.replace("max_megapixels", "dataset.max_megapixels")


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of files.json; an empty dictionary if it is missing, or not as `load_folder` wrote it."""
    index = read_json_object(folder / "files.json", max_bytes=MAX_BYTES_OF_LIST)
    return index if is_index(index) else {}


def is_index(index: dict[str, Any]) -> bool:
    """Return whether all that `load_folder` reads of files.json has the types with which it is written."""
    try:
        pairs = all(isinstance(text, str) for name, reason in index["unreadable"] for text in (name, reason))
        ranges = [check_ranges(index[key]) for key in ("value_ranges", "given_value_ranges") if key in index]
        return pairs and len(ranges) > 0 and all(isinstance(name, str) for name in index["outside"])
    except (KeyError, TypeError, ValueError):  # InputError is a ValueError
        return False


def subfolder_labels(root: Path, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return labels (M,) by the first folder of each path, -1 for files without one, and the folder names, sorted."""
    if is_image_list(root):
        raise InputError(
            f"dataset.labelled is true and {root} is a list of files",
            expected="a folder with a sub-folder for each class",
            do="set dataset.labelled=false",
        )
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
