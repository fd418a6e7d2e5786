"""Output folders that are complete or not there: made beside their place and moved into it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deepclust.engine.output_files import SUFFIX_WHILE_WRITTEN, check_output_file, name_while_written
from deepclust.errors import InputError


class NewFolder:
    """A folder that is still made: it is going to be at `path`, and is meanwhile at `work`."""

    def __init__(self, path: Path, work: Path) -> None:
        self.path = path
        self.work = work
        self.moved: list[tuple[Path, Path]] = []  # from where, to where

    def move_into_place(self) -> None:
        """Give the folder its place. From here on everything in it is there, all at once."""
        if not self.path.exists():
            self.move(self.work, self.path)
            return
        for entry in sorted(self.work.iterdir()):  # the folder was there, and empty
            self.move(entry, self.path / entry.name)

    def move(self, old: Path, new: Path) -> None:
        """Move a file or folder, and remember where it was."""
        old.rename(new)
        self.moved.append((old, new))

    def move_back(self) -> None:
        """Take away what has been given its place, as far as the system allows."""
        for old, new in reversed(self.moved):
            with suppress(OSError):
                new.rename(old)


@contextmanager
def folders_above(path: Path) -> Iterator[None]:
    """Make the folders above an output; where the `with` block fails, those that were made are removed again."""
    above = path.absolute().parent
    new = [folder for folder in (above, *above.parents) if not folder.exists()]
    above.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in new:
            with suppress(OSError):  # it holds something else by now
                folder.rmdir()
        raise


def check_new_folder(folder: Path, *, key: str, entry: str, cure: str | None = None) -> None:
    """Refuse a folder that holds something, or that cannot be made, before the work for it is done.

    `key` is the key that names it, `entry` the longest name of what is going to be in it, and `cure` what to do about a
    folder that holds something, if that is not to name another or to remove it.

    Raises:
        InputError: unless it is empty or missing and can be written.
    """
    is_folder = os.path.isdir(folder)  # False for a name that is too long, which is refused below
    if (is_folder and any(entry != name_of_work(folder) for entry in folder.iterdir())) or os.path.isfile(folder):
        raise InputError(
            f"{folder} {'is not empty' if is_folder else 'is a file'}",
            expected="a new or empty folder",
            do=cure or f"set {key}=DIR to another, or remove it",
        )
    check_output_file(folder / entry, key=key)
    check_output_file(name_of_work(folder), key=key)


def name_of_work(folder: Path) -> Path:
    """Return the folder where files are while they are made: in the folder if it is there, else beside it."""
    return folder / SUFFIX_WHILE_WRITTEN if os.path.isdir(folder) else name_while_written(folder)


@contextmanager
def make_folder(folder: Path) -> Iterator[NewFolder]:
    """Give a place to make a folder in; where `move_into_place` is not reached, nothing is left of it.

    Nor is anything left of it where the `with` block fails after that, or while the folder gets its place.
    """
    folder = folder.absolute()
    work = name_of_work(folder)
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    work.mkdir(parents=True)
    made = NewFolder(folder, work)
    try:
        yield made
    except BaseException:
        made.move_back()
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
