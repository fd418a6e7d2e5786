"""Folders above an output are there with it, and gone again where it fails."""

import pytest

from deepclust.engine.output_folders import folders_above


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
