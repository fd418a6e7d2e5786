"""Files with the same content are found whatever they are called."""

from pathlib import Path

import pytest

from deepclust.datasets import identical_files
from deepclust.datasets.identical_files import find_identical_files


def test_copies_are_found_and_only_files_of_one_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [b"cat", b"dog", b"cat", b"horse", b"", b"", b"dog", b"dog", b"cow"]
    paths = [tmp_path / f"{number}.png" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    read: list[str] = []
    hash_file = identical_files.hash_file
    monkeypatch.setattr(identical_files, "hash_file", lambda path: read.append(Path(path).name) or hash_file(path))
    assert find_identical_files([*map(str, paths), str(tmp_path / "gone.png")]) == [[0, 2], [1, 6, 7]]
    assert "3.png" not in read and "8.png" in read
    assert find_identical_files([]) == []
