"""Lists of image files: text files with a path on each line."""

import os
from pathlib import Path

from deepclust.errors import InputError

LIST_SUFFIX = ".txt"


def is_image_list(path: Path) -> bool:
    """Return whether a path is that of a text file, which lists images."""
    return path.suffix.lower() == LIST_SUFFIX and path.is_file()


def read_image_list(path: Path) -> list[str]:
    """Return the absolute paths that a text file lists, one on each line; empty lines are passed over.

    Paths are those of the folder that the list is in, unless they are absolute.

    Raises:
        InputError: if it lists none.
    """
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{path} lists no image", expected="the path of an image on each line", do="write them there")
    folder = path.expanduser().absolute().parent
    return [os.path.normpath(folder / Path(line.removesuffix("\r")).expanduser()) for line in lines]


def write_image_list(path: Path, files: list[str]) -> None:
    """Write a list that `read_image_list` reads.

    Raises:
        InputError: if a name holds a line break.
    """
    for file in files:
        if "\n" in file:
            raise InputError(f"{file!r} holds a line break", expected="names without one", do="rename this file")
    path.write_text("".join(f"{file}\n" for file in files), encoding="utf-8", errors="surrogateescape")
