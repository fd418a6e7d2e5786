"""Your own folder of image files, decoded once into an array that is read memory-mapped."""

import hashlib
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.datasets.array_files import open_images
from deepclust.datasets.conversion import make_once, read_collecting, write_images, write_unreadable
from deepclust.datasets.image_decoding import SUFFIXES, scan
from deepclust.datasets.image_sources import ArraySource, ImageSet
from deepclust.errors import InputError

logger = logging.getLogger(__name__)


def load_folder(*, path: str, data_dir: str, image_size: int, channels: int, labelled: bool) -> ImageSet:
    """All image files below `path`, as deep as they lie, sorted by path; fitted and evaluated alike.

    They are stored as `files.decode` gives them in <data_dir>/folder-<hash of path, size and channels>:
    train_images.npy, files.json (paths, sizes and times of change) and, where there are any, unreadable.txt
    (the files that are left out, and why). The stored images serve until a file is added, removed or changed.

    With `labelled` the first folder on the way from `path` to a file is its class; files in `path` itself
    have none (-1). Grey images are stored in colour like any other unless `channels` is 1.

    Raises:
        InputError: no such folder, no image in it that can be read, or no sub-folder although `labelled`.
    """
    root = Path(path).expanduser().absolute()
    files = find(root)
    made_from = {"format": 1, "path": str(root), "image_size": image_size, "channels": channels}
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:10]
    folder = Path(data_dir).expanduser().absolute() / f"folder-{key}"

    def make(work: Path) -> None:
        unreadable = store(work, root, [name for name, _, _ in files], image_size, channels)
        index = {**made_from, "files": files, "unreadable": unreadable}
        (work / "files.json").write_text(json.dumps(index))

    def ready(here: Path) -> bool:
        return (here / "files.json").is_file() and read_index(here)["files"] == files

    make_once(folder, make, ready=ready)
    left_out = {name for name, _ in read_index(folder)["unreadable"]}
    names = [name for name, _, _ in files if name not in left_out]
    logger.info("%d images of %s, stored in %s", len(names), root, folder)
    if left_out:
        logger.warning(
            "%d of %d image files in %s could not be read and are left out; %s lists them",
            *(len(left_out), len(files), root, folder / "unreadable.txt"),
        )
    source = ArraySource([open_images(folder / "train_images.npy")])
    labels, class_names = subfolder_labels(root, names) if labelled else (None, None)
    paths = [str(root / name) for name in names]
    return ImageSet(source, source, labels=labels, class_names=class_names, paths=paths)


def find(root: Path) -> list[list[Any]]:
    """[path below root, bytes, modification time in ns] of every image file."""
    if not root.is_dir():
        raise InputError(
            f"{root} is {'a file' if root.exists() else 'missing'}",
            expected="a folder of images",
            do="set dataset.path=DIR" + (", or dataset=arrays for an array file" if root.is_file() else ""),
        )
    try:
        files, others = scan(root)
    except OSError as error:
        raise InputError(
            f"{root} cannot be searched: {error}",
            expected="folders that can be listed",
            do="change their permissions or set another dataset.path=DIR",
        ) from error
    if others:
        logger.info("%d files in %s are passed over: %s", others.total(), root, kinds(others))
    if not files:
        raise InputError(
            f"{root} holds no image file" + (f" (but {kinds(others)})" if others else ""),
            expected=f"files ending in {' '.join(sorted(SUFFIXES))}",
            do="set dataset.path=DIR to a folder of images",
        )
    return [list(file) for file in files]


def kinds(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {suffix or 'without ending'}" for suffix, number in counts.most_common(5))


def store(work: Path, root: Path, names: list[str], image_size: int, channels: int) -> list[tuple[str, str]]:
    """Decode the files `names` below `root` into a folder; return (name, reason) of the unreadable ones."""
    failed: list[tuple[str, str]] = []
    paths = [str(root / name) for name in names]
    chunks = read_collecting(paths, failed, image_size=image_size, channels=channels)
    shape = (image_size, image_size, channels)
    if not write_images(work / "train_images.npy", chunks, shape=shape, total=len(paths)):
        raise InputError(
            f"none of the {len(paths)} image files in {root} can be read (the first: {failed[0][1]})",
            expected="at least one image",
            do="set dataset.path=DIR to a folder of whole images",
        )
    unreadable = [(str(Path(path).relative_to(root)), reason) for path, reason in failed]
    if unreadable:
        write_unreadable(work, unreadable)
    return unreadable


def read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "files.json").read_text())


def subfolder_labels(root: Path, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels (M,) by the first folder of each path, -1 for files without one; the folders' names, sorted."""
    folders = [Path(name).parts[0] if len(Path(name).parts) > 1 else None for name in names]
    classes = sorted({folder for folder in folders if folder is not None})
    if not classes:
        raise InputError(
            f"dataset.labelled is true and {root} has no sub-folder with images",
            expected="a sub-folder for each class",
            do="set dataset.labelled=false",
        )
    number = {folder: label for label, folder in enumerate(classes)}
    return np.array([-1 if folder is None else number[folder] for folder in folders], np.int64), classes
