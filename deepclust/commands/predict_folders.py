"""Image files sorted into one folder for each cluster: all of them, or none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepclust.engine.output_files import (
    MAX_NAME_BYTES,
    SUFFIX_WHILE_WRITTEN,
    check_output_file,
    errors_naming,
    name_while_written,
)
from deepclust.errors import InputError

MAX_SUFFIX_BYTES = 32


class SortedImages:
    """Copies of image files, or links to them, in one folder for each cluster, below a folder that is still made.

    `folder` is the folder that they are going to be in, `work` the one where they are meanwhile.
    """

    def __init__(self, folder: Path, work: Path, *, link: bool) -> None:
        self.folder = folder
        self.work = work
        self.link = link

    def add(self, path: str | None, cluster: int, *, index: int) -> None:
        """Copy a file, or link to it, into the folder of its cluster. Its name there begins with its index.

        Raises:
            InputError: if there is no file, for the rows of an array have none.
        """
        if path is None:
            raise InputError("the images are rows of an array", expected="image files to sort", do="leave sort_to out")
        cluster_folder = self.work / f"cluster_{cluster:03d}"
        cluster_folder.mkdir(exist_ok=True)
        source = Path(path).absolute()
        target = cluster_folder / shorten_name(f"{index:06d}_{source.name}")
        with errors_naming(target):
            if self.link:
                target.symlink_to(source)
            else:
                shutil.copy2(source, target)

    def move_into_place(self) -> None:
        """Give the sorted files their place. From here on they are there, all at once."""
        if not self.folder.exists():
            self.work.rename(self.folder)
            return
        for cluster_folder in sorted(self.work.iterdir()):  # the folder was there, and empty
            cluster_folder.rename(self.folder / cluster_folder.name)
        self.work.rmdir()


def check_sort_folder(folder: Path) -> None:
    """Refuse to sort into a folder that holds something: clusters of two calls would be mixed.

    Raises:
        InputError: unless it is empty or missing and can be written.
    """
    is_folder = os.path.isdir(folder)  # False for a name that is too long, which is refused below
    if (is_folder and any(entry != name_of_work(folder) for entry in folder.iterdir())) or os.path.isfile(folder):
        raise InputError(
            f"{folder} {'is not empty' if is_folder else 'is a file'}",
            expected="a new or empty folder to sort into",
            do="set sort_to=DIR to another, or remove it",
        )
    check_output_file(folder / "cluster_000", key="sort_to")
    check_output_file(name_of_work(folder), key="sort_to")


def name_of_work(folder: Path) -> Path:
    """Return the folder where files are while they are sorted: in the folder if it is there, else beside it."""
    return folder / SUFFIX_WHILE_WRITTEN if os.path.isdir(folder) else name_while_written(folder)


@contextmanager
def sort_images(folder: Path | None, *, link: bool) -> Iterator[SortedImages | None]:
    """Give a place to sort image files into; where `move_into_place` is not reached, nothing is left of it.

    None if there is no folder to sort into.
    """
    if folder is None:
        yield None
        return
    folder = folder.absolute()
    work = name_of_work(folder)
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    work.mkdir(parents=True)
    try:
        yield SortedImages(folder, work, link=link)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def shorten_name(name: str) -> str:
    """Return a file name that is not too long for a file system: the end before its suffix is left out."""
    encoded = os.fsencode(name)
    if len(encoded) <= MAX_NAME_BYTES:
        return name
    suffix = os.fsencode(os.path.splitext(name)[1])
    if len(suffix) > MAX_SUFFIX_BYTES:  # what follows the last dot is no suffix then
        suffix = b""
    stem = encoded[: MAX_NAME_BYTES - len(suffix)]
    while ends_within_character(stem):
        stem = stem[:-1]
    return os.fsdecode(stem + suffix)


def ends_within_character(encoded: bytes) -> bool:
    """Return whether UTF-8 text ends in the middle of a character. Bytes that are no such text are left alone."""
    try:
        encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False
