"""Output folders, and the folders above an output: complete, or gone again where something fails."""

from pathlib import Path

import pytest

from deepclust.engine.output_folders import folders_above, make_folder


def test_new_folders_go_with_a_failure_and_others_stay(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match="no"), folders_above(tmp_path / "old/new/deep/out.csv"):
        assert (tmp_path / "old/new/deep").is_dir()
        raise ValueError("no")
    assert (tmp_path / "old").is_dir() and not (tmp_path / "old/new").exists()


def test_what_was_written_stays(tmp_path):
    with pytest.raises(KeyboardInterrupt), folders_above(tmp_path / "a/b/out.csv"):
        (tmp_path / "a/kept.txt").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept.txt"]
    with folders_above(tmp_path / "c/out.csv"):
        pass
    assert (tmp_path / "c").is_dir()


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("fails", ["in place", "while it gets its place"])
def test_a_folder_that_has_its_place_goes_with_a_failure(is_there, fails, tmp_path, monkeypatch):
    folder = tmp_path / "new"
    if is_there:
        folder.mkdir()
    if fails == "while it gets its place":
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda old, new: rename(old, new) if old.name == "a" else 1 / 0)
    with pytest.raises(ZeroDivisionError), make_folder(folder) as made:
        (made.work / "a").mkdir()
        (made.work / "b").mkdir()
        made.move_into_place()
        raise ZeroDivisionError
    assert list(tmp_path.rglob("*")) == [folder] * is_there
