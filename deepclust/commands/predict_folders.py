"""Image files sorted into one folder for each cluster: all of them, or none."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from deepclust.engine.output_files import name_file_in_errors, shorten_name
from deepclust.engine.output_folders import NewFolder, make_folder
from deepclust.errors import InputError

Way = Literal["copy", "link", "move"]

MAX_LETTERS = 60  # of a cluster's name in the name of its folder


class SortedImages:
    """Copies of image files, or links to them, in one folder for each cluster, below a folder that is still made.

    The folders are called by the number of the cluster and its name in `names`, where it has one. Files that are going
    to be moved get a second name, which takes no room, where the file system has such names.
    """

    def __init__(self, folder: NewFolder, *, way: Way, names: Mapping[int, str]) -> None:
        self.folder = folder
        self.way = way
        self.names = names

    def add(self, path: str | None, cluster: int, *, index: int) -> None:
        """Copy a file, or link to it, into the folder of its cluster. Its name there begins with its index.

        Raises:
            InputError: if there is no file, for the rows of an array have none.
        """
        if path is None:
            raise InputError("the images are rows of an array", expected="image files to sort", do="leave sort_to out")
        cluster_folder = self.folder.work / make_folder_name(cluster, self.names)
        cluster_folder.mkdir(exist_ok=True)
        source = Path(path).absolute()
        target = cluster_folder / shorten_name(f"{index:06d}_{source.name}")
        with name_file_in_errors(target):
            if self.way == "link":
                target.symlink_to(source)
            elif self.way == "copy" or source.is_symlink() or not make_hard_link(source, target):
                shutil.copy2(source, target)

    def move_into_place(self) -> None:
        """Give the sorted files their place. From here on they are there, all at once."""
        self.folder.move_into_place()


@contextmanager
def sort_images(folder: Path | None, *, way: Way, names: Mapping[int, str]) -> Iterator[SortedImages | None]:
    """Give a place to sort image files into; where `move_into_place` is not reached, nothing is left of it.

    None if there is no folder to sort into.
    """
    if folder is None:
        yield None
        return
    with make_folder(folder) as made:
        yield SortedImages(made, way=way, names=names)


def make_hard_link(source: Path, target: Path) -> bool:
    """Give a file a second name; return whether the file system can do that."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def make_folder_name(cluster: int, names: Mapping[int, str]) -> str:
    """Return the name of the folder for the images of a cluster: `cluster_003`, or `cluster_003_black_cats`."""
    letters = "".join(letter if letter.isalnum() else " " for letter in names.get(cluster, ""))
    return "_".join([f"cluster_{cluster:03d}", *letters[:MAX_LETTERS].split()])
