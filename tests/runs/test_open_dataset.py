"""Runs on a long-tailed variant of a data set: every command takes the same images, whatever the seed."""

import csv

import pytest
from PIL import Image

import deepclust
from deepclust.commands import evaluate
from deepclust.commands.train import run
from deepclust.config.plain_values import resolve_to_dict
from deepclust.config.schema import check_plain_values
from deepclust.errors import InputError
from tests.conftest import compose_train, compose_verb

SMALL = ["method=kmeans", "backbone=identity", "hardware=cpu", "report.map_points=0"]
IMBALANCE = ["dataset=digits", "dataset.imbalance=0.1", *SMALL]


def read_labels(folder):
    with (folder / "assignments.csv").open() as file:
        return [int(row["label"]) for row in csv.DictReader(file)]


def test_all_commands_take_the_same_images(tmp_path, capsys):
    results = [run(compose_train(*IMBALANCE, f"seed={seed}"), tmp_path / str(seed)) for seed in (0, 1)]
    labels = read_labels(tmp_path / "0")
    assert labels == read_labels(tmp_path / "1"), "the seed of the run decides on nothing of the data set"
    assert results[0]["num_images"] == len(labels) and 178 == labels.count(0) > 4 * labels.count(9)
    assert results[0]["dataset"] == "digits, imbalance 0.1"
    output = evaluate.main(compose_verb("evaluate", f"run={tmp_path / '0'}"))
    for key in ("scores", "smallest_classes_recall"):
        assert output[key] == results[0][key], key
    assert "are those of other images" not in capsys.readouterr().err
    assert deepclust.load_run(tmp_path / "0").features().shape == (len(labels), 64)


@pytest.mark.parametrize("value", ["0", "-0.5", "1.5", "nan", "true", "much"])
def test_other_values_are_refused(value):
    cfg = compose_train("dataset=digits", f"dataset.imbalance={value}")
    with pytest.raises(InputError, match=r"dataset\.imbalance"):
        check_plain_values(resolve_to_dict(cfg))


def test_a_run_without_labels_is_refused(tmp_path):
    overrides = ["dataset=folder", f"dataset.path={tmp_path}", "dataset.num_clusters=2"]
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    cfg = compose_train(*overrides, *IMBALANCE[1:], f"data_dir={tmp_path / 'data'}")
    with pytest.raises(InputError, match="has no labels"):
        run(cfg, tmp_path / "run")
