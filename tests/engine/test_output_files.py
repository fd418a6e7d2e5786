"""Output files after an error of the system: whole or not there, and named."""

import resource
from collections.abc import Callable, Iterator

import pytest

from deepclust.engine.output_files import replace_text_file, write_bytes, write_text, write_text_once


@pytest.fixture
def no_file_over_five_bytes() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_in_pieces(path, text):
    with replace_text_file(path) as file:
        file.writelines(text)


@pytest.mark.parametrize(
    "write", [write_text_once, write_text, write_in_pieces, lambda path, text: write_bytes(path, text.encode())]
)
def test_half_a_file_is_none(write: Callable, tmp_path, no_file_over_five_bytes):
    with pytest.raises(OSError, match="File too large") as caught:
        write(tmp_path / "file", "more than five bytes")
    assert caught.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())
    write(tmp_path / "file", "five")
    assert (tmp_path / "file").read_text() == "five"


def test_a_file_that_is_there_is_not_written_again(tmp_path):
    assert write_text_once(tmp_path / "file", "first") and not write_text_once(tmp_path / "file", "second")
    assert (tmp_path / "file").read_text() == "first"
