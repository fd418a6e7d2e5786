"""Wrong paths and numbers are told before torch is imported, and such a call leaves no folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepclust.cli.main import main

# What is told, by the command; F holds three files, E is an empty folder.
WRONG = {
    "train dataset=folder dataset.path=nowhere dataset.num_clusters=3": "nowhere is missing",
    "train dataset=folder dataset.path=F/0.png dataset.num_clusters=3": "is a file",
    "train dataset=folder dataset.path=F dataset.num_clusters=4": "dataset.num_clusters is 4 and",
    "train dataset=folder dataset.path=F dataset.num_clusters=2 batch_size=5": "batch_size is 5 and",
    "train start=E": "E is no finished run",
    "train batch_size=0": "batch_size is 0",
    "cluster images=nowhere num_clusters=3": "nowhere is missing",
    "cluster images=F num_clusters=4": "num_clusters is 4 and",
    "cluster images=list.txt num_clusters=2": "holds 1 file",
    "cluster images=list.txt num_clusters=two": "num_clusters is 'two'",
    "predict run=E images=F": "E holds no checkpoints/last.ckpt",
    "predict run=R images=nowhere": "nowhere is missing",
    "predict run=R images=F output=F": "F is a folder",
    "predict run=R images=F sort_to=F": "F is not empty",
    "evaluate run=nowhere": "nowhere holds no checkpoints/last.ckpt",
    "export run=E format=onnx output=x": "E holds no",
    "features run=E": "E holds no",
    "train -m start=E seed=0,1": "2 of 2 jobs failed",
}


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A working folder with what the commands name."""
    for folder in ("F", "E", "R/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(3):
        (tmp_path / f"F/{number}.png").touch()
    (tmp_path / "R/checkpoints/last.ckpt").touch()
    (tmp_path / "list.txt").write_text("F/0.png\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", WRONG)
def test_a_refused_call_says_why_and_leaves_nothing(command, files, monkeypatch, capsys):
    before = sorted(files.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["deepclust", *command.split()])
    assert main() == 2
    error = capsys.readouterr().err
    assert WRONG[command] in error and error.count("; expected ") == error.count("\n")
    assert sorted(files.rglob("*")) == before


def test_none_of_it_imports_torch(files):
    code = (
        "import sys; from deepclust.cli.main import main\n"
        "for command in sys.argv[1:]:\n"
        "    sys.argv = ['deepclust', *command.split()]\n"
        "    assert main() == 2, command\n"
        "    assert not {'torch', 'lightning', 'numpy'} & set(sys.modules), command\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *WRONG], capture_output=True, text=True, cwd=files)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_the_command_names_keeps_the_error(files, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deepclust", "train", "start=E", "hydra.run.dir=mine"])
    assert main() == 2
    assert "E is no finished run" in (files / "mine/error.txt").read_text()


def test_a_refused_call_leaves_a_finished_run_as_it_was(files, monkeypatch):
    run = files / "outputs/cluster/F"
    (run / ".hydra").mkdir(parents=True)
    for name in (".hydra/config.yaml", "results.json", "cluster.log"):
        (run / name).write_text("kept\n")
    monkeypatch.setattr(sys, "argv", ["deepclust", "cluster", "images=F", "num_clusters=4"])
    assert main() == 2
    assert [(run / name).read_text()[:5] for name in (".hydra/config.yaml", "results.json")] == ["kept\n"] * 2


def test_files_are_counted_as_far_as_needed_and_links_in_circles_end(tmp_path):
    from deepclust.datasets.input_paths import count_files

    (tmp_path / "a/.hidden").mkdir(parents=True)
    os.symlink(tmp_path, tmp_path / "a/back")
    for name in ("1.png", "a/2.png", "a/.hidden/3.png", ".4.png"):
        (tmp_path / name).touch()
    assert [count_files(tmp_path, at_most=n) for n in (1, 2, 9)] == [1, 2, 2]
