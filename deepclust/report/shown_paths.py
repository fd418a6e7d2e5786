"""Paths as a report shows them: relative ones, because a report that is passed on should not tell where one works."""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

ABSOLUTE = re.compile(r"(?<![\w.~/…:-])/[^\s'\"=,:;\[\]{}()]+(?:/[^\s'\"=,:;\[\]{}()]+)+/?")


@dataclass(frozen=True)
class ShownPaths:
    """The images of a report: what they are called, and where the report finds their files."""

    names: list[str] | None  # None: the images have no files
    link: Callable[[int], str] | None  # by the position of an image; None: the files are not beside the report


def show_image_paths(paths: Sequence[str] | None, folder: Path, *, root: Path | None, absolute: bool) -> ShownPaths:
    """Return names of image files relative to `root`, and links to them relative to the report's `folder`.

    `root` is where the images are; None: the folder that holds all of them. Files to which only a path through the
    home folder, or the root of the file system, would lead get no link. With `absolute`, names and links are absolute.
    """
    if paths is None:
        return ShownPaths(None, None)
    if absolute:
        full = [os.path.abspath(path) for path in paths]
        return ShownPaths(full, lambda index: f"file://{quote_path(full[index])}")
    start = find_common_folder(paths) if root is None or not root.is_dir() else str(root)
    if is_telling(start):  # the names would begin with the home folder; then the last two parts have to do
        names = ["/".join(Path(path).parts[-2:]).lstrip("/") for path in paths]
    else:
        names = [os.path.relpath(path, start) for path in paths]
    report = os.path.abspath(folder)
    if is_telling(os.path.commonpath([report, os.path.abspath(start)])):
        return ShownPaths(names, None)
    return ShownPaths(names, lambda index: quote_path(os.path.relpath(os.path.abspath(paths[index]), report)))


def find_common_folder(paths: Sequence[str]) -> str:
    """Return the folder that holds all of these files, directly or in folders of its own."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])


def is_telling(start: str) -> bool:
    """Return whether paths that begin at this folder can name the home folder: it lies below."""
    return start == os.path.sep or Path(start) in Path.home().parents


def quote_path(path: str) -> str:
    """Return a path as a link, where `%` and other signs that mean something in links are written as numbers."""
    return quote(os.fsencode(path))


def hide_places(value: Any, folder: Path) -> Any:
    """Return text without absolute paths, also within the lists and dictionaries of a configuration.

    Paths below the working directory or the report's `folder` become relative to these, those below the home folder
    begin with `~`, and of others the last part is left.
    """
    if isinstance(value, dict):
        return {key: hide_places(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [hide_places(item, folder) for item in value]
    return shorten_paths(value, folder) if isinstance(value, str) else value


def shorten_paths(text: str, folder: Path) -> str:
    """Return a text in which absolute paths are shortened as in `hide_places`."""
    working_directory, home = os.getcwd(), str(Path.home())
    if text.startswith("/") and "\n" not in text and " -" not in text:
        return shorten_path(text, folder)  # a path as a whole, which may hold spaces and commas
    for place, instead in ((os.path.abspath(folder), "."), (working_directory, "."), (home, "~")):
        if place != os.path.sep:
            text = re.sub(rf"(?<![\w.~/]){re.escape(place)}(?=/|\W|$)", instead, text)
    return ABSOLUTE.sub(lambda found: shorten_path(found[0], folder), text)


def shorten_path(path: str, folder: Path) -> str:
    """Return one absolute path, shortened as in `hide_places`."""
    for place, instead in ((os.path.abspath(folder), "."), (os.getcwd(), "."), (str(Path.home()), "~")):
        if place != os.path.sep and Path(path).is_relative_to(place):
            rest = os.path.relpath(path, place)
            return rest if instead == "." else os.path.join(instead, "" if rest == "." else rest)
    return f"…/{Path(path).name}"


def hide_places_in_command(command: str | Sequence[str], folder: Path) -> str:
    """Return a command line in which absolute paths, also those after `=`, are shortened as in `hide_places`."""
    try:
        words = shlex.split(command) if isinstance(command, str) else list(command)
    except ValueError:  # a quote that is not closed
        return shorten_paths(str(command), folder)
    shown = []
    for word in words:
        key, equals, path = word.partition("=")
        if equals and path.startswith("/"):
            shown.append(f"{key}={shorten_path(path, folder)}")
        else:
            shown.append(shorten_path(word, folder) if word.startswith("/") else shorten_paths(word, folder))
    return shlex.join(shown)
