"""Small files of state beside images, features and runs, damaged or something else: made again, or one line."""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_module
from PIL import Image

from deepclust.cli.main import main
from deepclust.clustering.number_of_clusters import MEASURES, ClusterNumberEstimate
from deepclust.commands.cluster import estimate_from_features
from deepclust.datasets.array_files import read_class_names
from deepclust.datasets.features import read_paths
from deepclust.datasets.folder import load_folder
from deepclust.datasets.named_datasets import load_class_folders
from deepclust.engine.small_files import read_json, read_yaml
from deepclust.errors import InputError
from deepclust.runs.sweep_jobs import read_sweep

pytestmark = pytest.mark.sampled

DEEP = "[" * 100_000 + "]" * 100_000
TEXTS = {
    "empty": "",
    "garbage": "\x00\x01garbage",
    "cut": '{"sha256": "12',
    "list": "[1, 2]",
    "null": "null",
    "number": "3",
    "text": '"text"',
    "deep": DEEP,
    "deep_inside": '{"key": [], "files": ' + DEEP + "}",
    "no_keys": "{}",
}
PLACES = {
    "pipe": os.mkfifo,  # reading it would wait for ever
    "folder": os.mkdir,
    "dangling": lambda file: os.symlink("nothing", file),
    "huge": lambda file: (file.touch(), os.truncate(file, 2**36)),  # takes no space
    "no_text": lambda file: file.write_bytes(b"\xff\xfe\x00{}"),
}
KINDS = [*TEXTS, *PLACES]


def damage(file: Path, kind: str) -> None:
    file.unlink(missing_ok=True)
    if kind in TEXTS:
        file.write_text(TEXTS[kind])
    else:
        PLACES[kind](file)


def write_images(folder: Path) -> Path:
    for name in ("train/a/0", "train/a/1", "train/b/2"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * int(name[-1]), np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_any_damage_is_a_value_error_or_one_of_the_system(kind, tmp_path):
    damage(tmp_path / "file.json", kind)
    if kind in ("list", "null", "number", "text", "no_keys"):
        assert read_json(tmp_path / "file.json") == json.loads(TEXTS[kind])
        return
    with pytest.raises((ValueError, OSError)) as caught:
        read_json(tmp_path / "file.json")
    assert "\n" not in str(caught.value)


WRONG_YAML = ["!!bool x", "!!int ''", "!!timestamp x", "- !!float ''", "a: b: c", "? {a: b}\n: c", "[1, 2", DEEP]
WRONG_YAML += ["".join(f"- &{n} [*{n - 1}, *{n - 1}]\n" if n else "- &0 [x, x]\n" for n in range(60))]  # 2^60 texts


@pytest.mark.parametrize("text", WRONG_YAML, ids=range(len(WRONG_YAML)))
def test_yaml_that_is_damaged_is_a_value_error(text, tmp_path):
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_yaml(tmp_path / "file.yaml")
    assert "\n" not in str(caught.value)
    (tmp_path / "0/.hydra").mkdir(parents=True)  # the file of a run and that of a sweep are read by it
    (tmp_path / "0/.hydra/overrides.yaml").write_text(text)
    (tmp_path / "0/results.json").write_text("{}")
    (tmp_path / "multirun.yaml").write_text(text)
    assert [job.overrides for job in read_sweep(tmp_path).jobs] == [{}]


WRONG_INDICES = {
    "ranges": {"value_ranges": "abc"},
    "range": {"value_ranges": {"integer": [9, 3]}},
    "unreadable": {"unreadable": [1, 2]},
    "outside": {"outside": 3},
    "no_ranges": {"value_ranges": None, "given_value_ranges": []},
}


@pytest.mark.parametrize("kind", [*KINDS, *WRONG_INDICES])
def test_the_list_of_a_folder_is_made_again(kind, tmp_path):
    images = write_images(tmp_path / "images")
    options = {"path": str(images), "data_dir": str(tmp_path / "data"), "image_size": 8, "channels": 1}
    expected = load_folder(**options, labelled=True)
    (file,) = (tmp_path / "data").glob("folder-*/files.json")
    if kind in WRONG_INDICES:
        file.write_text(json.dumps(json.loads(file.read_text()) | WRONG_INDICES[kind]))
    else:
        damage(file, kind)
    found = load_folder(**options, labelled=True)
    rows = np.arange(3)
    assert found.paths == expected.paths and found.fit.read(rows).equal(expected.fit.read(rows))
    assert file.is_file() and json.loads(file.read_text())["path"] == str(images)


WRONG_LISTS = {
    "splits": {"splits": []},
    "split": {"splits": {"train": {"paths": ["x"], "labels": []}}},
    "paths": {"splits": {"train": {"paths": [1, 2, 3], "labels": [0, 0, 1]}}},
    "names": {"class_names": None},
}


@pytest.mark.parametrize("kind", [*KINDS, *WRONG_LISTS])
def test_the_list_of_class_folders_is_made_again(kind, tmp_path):
    options = {"folder": str(tmp_path / "list"), "root": str(write_images(tmp_path / "images")), "fit": ["train"]}
    options |= {"evaluate": None, "image_size": 8, "channels": 1, "num_classes": 2, "num_workers": 1}
    expected = load_class_folders(**options)
    file = tmp_path / "list/files.json"
    if kind in WRONG_LISTS:
        file.write_text(json.dumps(json.loads(file.read_text()) | WRONG_LISTS[kind]))
    else:
        damage(file, kind)
    found = load_class_folders(**options)
    assert found.paths == expected.paths and found.labels.tolist() == [0, 0, 1] and found.class_names == ["a", "b"]


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    np.savez(folder / "few.npz", images=np.arange(30 * 64, dtype=np.uint32).reshape(30, 8, 8).astype(np.uint8))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_features_were_made_of(kind, features, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "features"
    arguments = ["dataset=arrays", f"dataset.path={features}/few.npz", "dataset.num_clusters=2", "backbone=identity"]
    arguments += ["views=digits", f"output={folder}", "accelerator=cpu"]
    monkeypatch.setattr(sys, "argv", ["deepclust", "features", *arguments])
    assert main() == 0
    written = (folder / "train_features.npy").read_bytes()
    damage(folder / "made_by.json", kind)
    capfd.readouterr()
    assert main() == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and "made_by.json is " in message, message
    assert (folder / "train_features.npy").read_bytes() == written
    file = folder / "made_by.json"
    shutil.rmtree(file) if file.is_dir() else file.unlink()  # the advice works
    assert main() == 0 and json.loads(file.read_text())["sha256"]


ESTIMATE = asdict(ClusterNumberEstimate(3, {"a": 3, "b": 3, "c": 4}, {"a": [(2, 0.5), (3, 0.7)]}))
WRONG_ESTIMATES = {
    "curves": ESTIMATE | {"curves": [1]},
    "curve": ESTIMATE | {"curves": {"a": [1, 2]}},
    "named": ESTIMATE | {"named": {}},
    "number": ESTIMATE | {"num_clusters": "three"},
    "no_number": ESTIMATE | {"num_clusters": None},
}


@pytest.mark.parametrize("kind", [*KINDS, *(f"wrong {name}" for name in WRONG_ESTIMATES), None])
def test_an_estimated_number_of_clusters(kind, tmp_path):
    (tmp_path / "made_by.json").write_text('{"sha256": "0"}')
    file = tmp_path / "number.json"
    if kind in KINDS:
        damage(file, kind)
    else:
        content = ESTIMATE if kind is None else WRONG_ESTIMATES[kind.removeprefix("wrong ")]
        file.write_text(json.dumps(content | {"key": ["0", 0, *MEASURES]}))
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        cfg = compose("cluster", overrides=["images=x", "num_clusters=auto"])
    if kind is None:
        assert asdict(estimate_from_features(cfg, tmp_path)) == ESTIMATE
        return
    with pytest.raises(InputError, match=r"number\.json is not as deepclust wrote it") as caught:
        estimate_from_features(cfg, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dangling"])
@pytest.mark.parametrize("read", [read_class_names, read_paths])
def test_lists_of_names(read, kind, tmp_path):
    damage(tmp_path / "names.json", kind)
    with pytest.raises(InputError, match=r"names\.json holds no list"):
        read(tmp_path / "names.json", 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["results.json", "error.txt", ".hydra/overrides.yaml"])
def test_a_comparison_passes_over_damaged_runs(name, kind, tmp_path, monkeypatch, capfd):
    good = {"format": 1, "dataset": "d", "method": "m", "backbone": "b", "num_clusters": 2, "epochs": 1, "seed": 0}
    good |= {"scores": {"kmeans": {"acc": 0.5, "nmi": 0.5, "ari": 0.5}}, "timing": {"train_seconds": 1.0}}
    for run in ("good", "bad"):
        (tmp_path / run / ".hydra").mkdir(parents=True)
        (tmp_path / run / ".hydra/config.yaml").write_text(yaml.safe_dump({"seed": 0}))
        (tmp_path / run / "results.json").write_text(json.dumps(good))
    if name == "error.txt":  # it is told of an unfinished run
        (tmp_path / "bad/results.json").unlink()
    damage(tmp_path / "bad" / name, kind)
    monkeypatch.setattr(sys, "argv", ["deepclust", "compare", f"runs={tmp_path}"])
    assert main() == 0
    output = capfd.readouterr()
    assert "Traceback" not in output.err and "good" not in output.err and " 50.0" in output.out
