"""names.json: written, edited, read, and put aside when it belongs to other clusters."""

import json
from pathlib import Path

import pytest

from deepclust.errors import InputError
from deepclust.runs.names_json import EARLIER_NAMES, NAMES, read_names, write_names


def test_names_are_read_as_they_were_written_and_edited(tmp_path: Path) -> None:
    assert read_names(tmp_path) == {}
    write_names(tmp_path, {0: "Katze ä", 3: "dog"}, earlier={})
    assert read_names(tmp_path) == {0: "Katze ä", 3: "dog"}
    (tmp_path / NAMES).write_text('{"0": " big \\n cats ", "3": "", "12": "horses"}')
    assert read_names(tmp_path) == {0: "big cats", 12: "horses"}


def test_edited_names_of_earlier_clusters_are_kept(tmp_path: Path) -> None:
    write_names(tmp_path, {0: "cat"}, earlier={})
    write_names(tmp_path, {0: "dog"}, earlier={"0": "cat"})  # nobody has changed it
    assert not (tmp_path / EARLIER_NAMES).exists()
    (tmp_path / NAMES).write_text('{"0": "my dogs"}')
    write_names(tmp_path, {0: "cow"}, earlier={"0": "dog"})
    assert json.loads((tmp_path / EARLIER_NAMES).read_text()) == {"0": "my dogs"}
    assert read_names(tmp_path) == {0: "cow"}
    write_names(tmp_path, {0: "cow"}, earlier={"0": "dog"})  # a run that was killed here and goes on
    assert not (tmp_path / "names-of-earlier-clusters-2.json").exists()
    (tmp_path / NAMES).write_text('{"0": "my cows"}')
    write_names(tmp_path, {0: "pig"}, earlier={"0": "cow"})
    assert json.loads((tmp_path / EARLIER_NAMES).read_text()) == {"0": "my dogs"}
    assert json.loads((tmp_path / "names-of-earlier-clusters-2.json").read_text()) == {"0": "my cows"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        f'{{"{"1" * 5000}": "cat"}}',
        '{"a": "cat"}',
        '{"-1": "cat"}',
        '{"²": "cat"}',
        '{"0": 5}',
        '{"0": null}',
        "\xff",
        "[" * 9999,
    ],
)
def test_a_file_that_names_no_clusters_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / NAMES).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"names.json does not name clusters: .*; mend it, or remove it"):
        read_names(tmp_path)
