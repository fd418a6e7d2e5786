"""Small files of state, such as a list of what a folder holds, read without trust in what lies in their place.

Whatever can be wrong with one is a ValueError here: a pipe that would be waited for, gigabytes, bytes that are no text,
JSON or YAML that is cut short or nested without end.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from deepclust.errors import InputError

MAX_BYTES = 2**26  # of a file that is read; one with results or checksums has a few thousand
MAX_BYTES_OF_LIST = 2**30  # of one with a line for each image; that of a million images has 0.1 to 0.2 GB


def read_small_text(path: Path, *, max_bytes: int = MAX_BYTES, errors: str = "strict") -> str:
    """Return the text of a file; `errors` says what bytes become that are no text, as in `bytes.decode`.

    Raises:
        ValueError: with a reason in one line, if it is no regular file, no text, or larger than `max_bytes`.
        OSError: if it is missing, or the system refuses to read it.
    """
    size = path.stat().st_size
    if not path.is_file():  # reading a pipe would wait for ever
        raise ValueError("it is no regular file")
    if size > max_bytes:
        raise ValueError(f"it has {size:,} bytes")
    return path.read_text(encoding="utf-8", errors=errors)


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: with a reason in one line, as `read_small_text`, or if the file is no JSON.
        OSError: if it is missing, or the system refuses to read it.
    """
    try:
        return json.loads(read_small_text(path, max_bytes=max_bytes))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class PlainLoader(yaml.SafeLoader):
    """Loads YAML as deepclust and Hydra write it: without aliases, a few of which can stand for endless lists."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it holds an alias")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        ValueError: with a reason in one line, as `read_small_text`, or if the file is no YAML, or holds an alias.
        OSError: if it is missing, or the system refuses to read it.
    """
    text = read_small_text(path)
    try:
        return yaml.load(text, PlainLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # a value that does not fit its tag, as in `!!bool x`, raises nearly any exception
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def is_finite_number(value: Any) -> bool:
    """Return whether a value of a JSON file is a number that fits into a float, and neither infinite nor NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # of an integer
        return False


def dict_or_empty(value: Any) -> dict[str, Any]:
    """Return a dictionary as it is, and an empty one for anything else in its place."""
    return value if isinstance(value, dict) else {}


def list_or_empty(value: Any) -> list[Any]:
    """Return a list as it is, and an empty one for anything else in its place."""
    return value if isinstance(value, list) else []


def read_state(path: Path, check: Callable[[Any], str | None], *, expected: str) -> Any:
    """Return the content of a JSON file that a command has written for a later one; None if there is none.

    `check` returns what is wrong with a content, or None; `expected` says what the file should hold.

    Raises:
        InputError: if something else is in its place. It is not replaced: it may be somebody's own.
    """
    if not os.path.lexists(path):
        return None
    content: Any = None
    try:
        content = read_json(path)
        reason = check(content)
    except FileNotFoundError:
        reason = "it is a link that leads nowhere"
    except ValueError as error:
        reason = " ".join(str(error).split())
    if reason is not None:
        raise InputError(
            f"{path} is not as deepclust wrote it: {reason}",
            expected=expected,
            do="remove it and start the same command again, which computes it anew, or bring back a copy",
        )
    return content


def read_json_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object, and an empty dictionary for whatever else lies there.

    It is for files of a folder that is made again as a whole where one is missing or damaged.
    """
    try:
        content = read_json(path, max_bytes=max_bytes)
    except (ValueError, OSError):
        return {}
    return content if isinstance(content, dict) else {}
