"""What a stopped run is told to go on with works when it is followed."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from deepclust.cli.arguments import quote_path
from deepclust.runs.provenance import describe_going_on


@pytest.mark.parametrize(
    ("arguments", "is_sweep", "expected"),
    [
        (["method=cc"], False, "deepclust train method=cc hydra.run.dir=runs/1"),
        (["method=cc", "hydra.run.dir=runs/1"], False, "deepclust train method=cc hydra.run.dir=runs/1"),
        (["-m", "seed=0,1"], True, "deepclust train -m seed=0,1 hydra.sweep.dir=runs/1"),
        (["dataset.path=my photos"], False, "deepclust train 'dataset.path=my photos' hydra.run.dir=runs/1"),
    ],
)
def test_command_names_the_folder(arguments, is_sweep, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert describe_going_on("train", arguments, Path("runs/1").absolute(), is_sweep=is_sweep) == expected
    assert shlex.split(expected)[2:-1] == [x for x in arguments if not x.startswith("hydra.")]


NAMES = ["a,b", "a=b", "it's", 'say "a"', "{b}", "$HOME", "end\\", "2024", "null", "[a]", "# no", "~x", "a:b", "é"]


@pytest.mark.parametrize("is_sweep", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_any_folder_comes_back(name, is_sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["+hydra.sweep.dir=old", "+hydra.run.dir=old"]
    command = describe_going_on("train", given, tmp_path / name, is_sweep=is_sweep)
    *_, kept, argument = shlex.split(command)
    assert kept == given[is_sweep]
    (override,) = OverridesParser.create().parse_overrides([quote_path(argument, is_sweep=is_sweep)])
    assert not override.is_sweep_override() and override.value() == name


def test_a_folder_elsewhere_is_absolute_and_secrets_are_hidden(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    command = describe_going_on("cluster", ["images=x", "hydra.job.env_set.KEY=secret"], tmp_path / "there")
    assert f"hydra.run.dir={tmp_path / 'there'}" in command and "secret" not in command


def test_a_python_program_is_told_a_call(tmp_path):
    text = describe_going_on("train", ["method=cc"], tmp_path / "run", is_from_python=True)
    assert text == f"call deepclust.train again with the same arguments and run_dir={str(tmp_path / 'run')!r}"
