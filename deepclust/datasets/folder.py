"""A data set from a folder of image files, which are decoded once into an array that is read memory-mapped."""

import hashlib
import json
import logging
from collections import Counter
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
from deepclust.datasets.image_decoding import IMAGE_SUFFIXES, find_image_files
from deepclust.datasets.image_sources import ArraySource, ImageSet
from deepclust.errors import InputError

logger = logging.getLogger(__name__)


def load_folder(*, path: str, data_dir: str, image_size: int, channels: int, labelled: bool) -> ImageSet:
    """Load all image files below `path`, at any depth, sorted by path; they are both fitted and evaluated.

    The images, as `decode_image` gives them, are stored in <data_dir>/folder-<hash of path, size and channels>. This
    folder holds train_images.npy, files.json (paths, sizes and modification times) and, if some files cannot be read,
    unreadable.txt with their names and the reasons. The stored images are used until a file is added, removed or
    changed.

    With `labelled`, the first sub-folder of `path` that leads to a file is its class; files directly in `path` have
    none (-1). Grey images are stored with three channels unless `channels` is 1.

    Raises:
        InputError: if there is no such folder, no readable image in it, or no sub-folder although `labelled`.
    """
    root = Path(path).expanduser().absolute()
    files = find_images(root)
    conversion = {"format": 1, "path": str(root), "image_size": image_size, "channels": channels}
    key = hashlib.sha256(json.dumps(conversion).encode()).hexdigest()[:10]
    folder = Path(data_dir).expanduser().absolute() / f"folder-{key}"

    def make(work: Path) -> None:
        unreadable = store_images(work, root, [name for name, _, _ in files], image_size, channels)
        index = {**conversion, "files": files, "unreadable": unreadable}
        (work / "files.json").write_text(json.dumps(index))

    def is_up_to_date(folder: Path) -> bool:
        return (folder / "files.json").is_file() and read_index(folder)["files"] == files

    make_folder_once(folder, make, ready=is_up_to_date)
    unreadable_names = {name for name, _ in read_index(folder)["unreadable"]}
    names = [name for name, _, _ in files if name not in unreadable_names]
    logger.info("%d images of %s, stored in %s", len(names), root, folder)
    if unreadable_names:
        logger.warning(
            "%d of %d image files in %s could not be read and are left out; %s lists them",
            *(len(unreadable_names), len(files), root, folder / "unreadable.txt"),
        )
    source = ArraySource([open_images(folder / "train_images.npy")])
    labels, class_names = subfolder_labels(root, names) if labelled else (None, None)
    paths = [str(root / name) for name in names]
    return ImageSet(source, source, labels=labels, class_names=class_names, paths=paths)


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
        logger.info("%d files in %s are ignored: %s", other_counts.total(), root, format_suffix_counts(other_counts))
    if not files:
        raise InputError(
            f"{root} holds no image file" + (f" (but {format_suffix_counts(other_counts)})" if other_counts else ""),
            expected=f"files ending in {' '.join(sorted(IMAGE_SUFFIXES))}",
            do="set dataset.path=DIR to a folder of images",
        )
    return [list(file) for file in files]


def format_suffix_counts(counts: Counter[str]) -> str:
    """Return, for instance, "3 .txt, 1 without suffix"; the five most frequent suffixes are listed."""
    return ", ".join(f"{number} {suffix or 'without suffix'}" for suffix, number in counts.most_common(5))


def store_images(work: Path, root: Path, names: list[str], image_size: int, channels: int) -> list[tuple[str, str]]:
    """Decode the files `names` below `root` and store them in the folder `work`.

    Returns:
        (name, reason) of the files that cannot be read.

    Raises:
        InputError: if no file can be read.
    """
    failed: list[tuple[str, str]] = []
    paths = [str(root / name) for name in names]
    chunks = decode_readable_images(paths, failed, image_size=image_size, channels=channels)
    shape = (image_size, image_size, channels)
    if not write_image_array(work / "train_images.npy", chunks, shape=shape, total=len(paths)):
        raise InputError(
            f"none of the {len(paths)} image files in {root} can be read (the first: {failed[0][1]})",
            expected="at least one image",
            do="set dataset.path=DIR to a folder of undamaged images",
        )
    unreadable = [(str(Path(path).relative_to(root)), reason) for path, reason in failed]
    if unreadable:
        write_unreadable_list(work, unreadable)
    return unreadable


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
