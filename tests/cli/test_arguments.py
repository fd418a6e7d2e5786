"""Arguments of a verb: paths are taken literally, and other values are parsed by Hydra."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from deepclust.cli.arguments import NULL_MEANS_NONE, PATH_KEYS, check_sweeper, quote_path
from deepclust.cli.main import VERBS, main
from deepclust.errors import InputError

CONF = Path(__file__).parents[2] / "conf"
NAMES = ["0", "2024", "-3", "1.5", "1e5", "1_000", ".5", "null", "true", "False", "inf", "nan", "Null"]


@pytest.mark.parametrize(
    "path",
    [
        "Süd, 2019",
        "a (1)",
        "it's",
        "x] {y}: z=1; 100%",
        "c:\\photos\\it's",
        "a\\b",
        "two\nlines",
        "ends in \\",
        "it\\'s\\",
        "~/photos",
        "plain/path-1.0",
        "日本",
    ],
)
def test_paths_are_taken_literally(path):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(quote_path(f"images={path}", is_sweep=False))
    assert override.key_or_group == "images" and override.value() == path and not override.is_sweep_override()


@pytest.mark.parametrize("argument", ["images='a, b'", "run=${start}", "runs=[a,b]", "method.spread=a, b", "run=a b,c"])
def test_values_with_hydra_syntax_are_left_to_hydra(argument):
    assert quote_path(argument, is_sweep=True) == argument


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", sorted(PATH_KEYS - {"hydra.run.dir"}))
def test_folder_named_by_a_number_is_text(key, name):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    verb = "export"  # none of its own paths may be null
    override = OverridesParser.create().parse_override(quote_path(f"{key}={name}", is_sweep=False, verb=verb))
    means_none = name.lower() == "null" and key in NULL_MEANS_NONE[""]
    assert override.value() == (None if means_none else name)


def test_folders_of_a_sweep_are_text():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(quote_path("run=0,a/b,null", is_sweep=True))
    texts = [getattr(value, "text", value) for value in override.sweep_iterator()]
    assert override.is_sweep_override() and texts == ["0", "a/b", "null"]


@pytest.mark.parametrize("verb", VERBS)
def test_null_means_none_where_the_configuration_says_so(verb):
    config = yaml.safe_load((CONF / f"{verb}.yaml").read_text())
    open_paths = {key for key in PATH_KEYS & config.keys() if config[key] is None}
    assert NULL_MEANS_NONE.get(verb, set()) == open_paths


def test_packages_to_trust_are_one_text():
    assert quote_path("trust=a,b.c", is_sweep=False) == "trust='a,b.c'"


@pytest.mark.parametrize("name", ["0", "2024", "null", "true", "1e3"])
@pytest.mark.parametrize(
    "arguments",
    [
        *("evaluate run={0}", "predict run={0} images=x", "export run={0} format=onnx output=y", "compare runs={0}"),
        *("cluster images={0} num_clusters=3", "train dataset=arrays dataset.path={0} dataset.num_clusters=3"),
        *("train dataset=folder dataset.path={0} dataset.num_clusters=3", "features run={0}"),
    ],
)
def test_missing_folder_is_named_in_one_line(arguments, name, tmp_path, monkeypatch, capfd):
    if name == "null" and arguments.startswith("features"):
        name = "2024"  # null is no run
    monkeypatch.chdir(tmp_path)
    verb, *rest = arguments.format(name).split()
    monkeypatch.setattr(sys, "argv", ["deepclust", verb, *rest])
    assert main() == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and message.count("; ") >= 2 and name in message


def test_folder_named_by_a_number_is_used(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    np.save(tmp_path / "2024/train_features.npy", np.random.default_rng(0).normal(size=(40, 3)).astype("f4"))
    train = ["train", "dataset=features", "dataset.path=2024", "dataset.num_clusters=2", "method=kmeans"]
    train += ["hardware=cpu", "batch_size=20", "report.map_points=0", "hydra.run.dir=0"]
    for arguments in (train, ["evaluate", "run=0"], ["compare", "runs=0"]):
        monkeypatch.setattr(sys, "argv", ["deepclust", *arguments])
        assert main() == 0, capfd.readouterr().err


def test_a_search_says_which_package_is_missing_where_hydra_has_no_plugins(monkeypatch):
    monkeypatch.setitem(sys.modules, "hydra_plugins", None)
    with pytest.raises(InputError, match=r"deepclust\[optuna\]"):
        check_sweeper(["hydra/sweeper=optuna"])
