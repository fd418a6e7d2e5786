"""Checks of the paths that images come from, by what is there; nothing is opened, so that they take no time."""

import os
from pathlib import Path

from deepclust.datasets.image_lists import is_image_list
from deepclust.errors import InputError

ARRAY_SUFFIXES = (".npy", ".npz")


def check_image_folder(root: Path) -> None:
    """Refuse what is neither a folder nor a list of images, as the value of `dataset.path`.

    Raises:
        InputError: naming the key to change.
    """
    if not (root.is_dir() or is_image_list(root)):
        raise InputError(
            f"{root} is {'a file' if root.exists() else 'missing'}",
            expected="a folder of images",
            do="set dataset.path=DIR" + (", or dataset=arrays for an array file" if root.is_file() else ""),
        )


def check_images_or_vectors(root: Path) -> None:
    """Refuse what `deepclust cluster` takes neither for images nor for vectors, as the value of `images`.

    Raises:
        InputError: naming the key to change.
    """
    is_array_file = root.is_file() and root.suffix in ARRAY_SUFFIXES
    if not (root.is_dir() or is_array_file or is_image_list(root)):
        raise InputError(
            f"{root} is {'no folder' if root.exists() else 'missing'}",
            expected="a folder of images, an array file (.npy, .npz), or a list of images (.txt)",
            do="set images=DIR",
        )


def check_new_images(images: Path) -> None:
    """Refuse a path with nothing behind it, as the value of `images` of `deepclust predict`.

    Raises:
        InputError: naming the key to change.
    """
    if not images.expanduser().exists():
        raise InputError(
            f"{images} is missing",
            expected="a folder of images, an image file, a list of images (.txt) or an array file (.npy, .npz)",
            do="set images=PATH",
        )


def count_files(folder: Path, *, at_most: int) -> int:
    """Count the files below a folder that can be images, whatever they are, and stop at `at_most`.

    Names that begin with a dot are passed over, and no folder is entered twice, as when images are searched. There may
    be fewer images, but not more. Where a folder cannot be listed, `at_most` is returned: the search says why.
    """
    count, pending, entered = 0, [folder], set()
    while pending and count < at_most:
        here = pending.pop()
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        pending.append(Path(entry.path))
                    else:
                        count += 1
        except OSError:
            return at_most
    return min(count, at_most)
