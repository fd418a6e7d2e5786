"""Files with the same content, byte by byte."""

import hashlib
import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path


def find_identical_files(paths: Sequence[str]) -> list[list[int]]:
    """Return groups of positions of files with the same content, at least two in a group.

    Only files that have the size of another one are read. A file that is no longer there, or is empty, is like no
    other.
    """
    sized = ((measure_size(path), position) for position, path in enumerate(paths))
    same_size = collect_groups((size, position) for size, position in sized if size)
    return sorted(
        group
        for positions in same_size
        for group in collect_groups((hash_file(paths[position]) or position, position) for position in positions)
    )


def collect_groups(keyed_positions: Iterable[tuple[Hashable, int]]) -> list[list[int]]:
    """Return the positions of each key that has several."""
    groups: dict[Hashable, list[int]] = {}
    for key, position in keyed_positions:
        groups.setdefault(key, []).append(position)
    return [group for group in groups.values() if len(group) > 1]


def measure_size(path: str) -> int:
    """Return the bytes of a file, 0 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def hash_file(path: str) -> str | None:
    """Return a checksum of the content of a file, None if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
