"""Run folders: which of them are runs of their own, and why a run is left out."""

import json
from pathlib import Path

import pytest

from tests.comparison.run_folders import compare, write_run


def test_stages_are_part_of_their_run(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "0", overrides=["method=scan"], method="scan")
    write_run(tmp_path / "sweep" / "0" / "before", method="scan_pretext")
    write_run(tmp_path / "sweep" / "0" / "clusters" / "kmeans-10-seed0", method="kmeans")
    (tmp_path / "sweep" / "1" / ".hydra").mkdir(parents=True)
    (tmp_path / "sweep" / "1" / ".hydra" / "config.yaml").touch()
    write_run(tmp_path / "sweep" / "1" / "before", method="scan_pretext")
    (tmp_path / "sweep" / "multirun.yaml").touch()

    comparison = compare(tmp_path / "sweep")
    assert [(row.method, row.folders) for row in comparison.rows] == [("scan", ("0",))]
    assert comparison.left_out == [("1", "unfinished: no results.json")]
    (row,) = compare(tmp_path / "sweep" / "1" / "before").rows
    assert row.method == "scan_pretext"


def test_the_searched_folder_may_be_the_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    assert compare(tmp_path / "run").rows[0].seeds == 1


def test_unfinished_runs_are_listed_with_the_reason(example_runs: Path) -> None:
    write_run(example_runs / "newer", format=2)
    write_run(example_runs / "partial")
    (example_runs / "partial" / "results.json").write_text('{"format": 1, "meth')
    write_run(example_runs / "older")
    (example_runs / "older" / "results.json").write_text('{"format": 1, "method": "cc"}')
    left_out = dict(compare(example_runs).left_out)
    assert set(left_out) == {"failed", "newer", "older", "partial", "stopped"}
    assert left_out["stopped"] == "unfinished: no results.json"
    assert left_out["failed"] == (
        'unfinished: no results.json; status.json: { "status": "failed" }; '
        "error.txt: Traceback line 3 RuntimeError: out of memory"
    )
    assert left_out["newer"] == "results.json is not of format 1"
    assert left_out["older"].startswith("results.json lacks dataset, backbone")
    assert left_out["partial"].startswith("results.json cannot be read")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dataset": None}, "dataset"),
        ({"seed": [1]}, "seed"),
        ({"num_clusters": "ten"}, "num_clusters"),
        ({"scores": [0.5]}, "scores"),
        ({"scores": {"kmeans": 0.5}}, "scores"),
        ({"scores": {"kmeans": {"acc": "high", "nmi": 0.5, "ari": 0.5}}}, "scores"),
        ({"baseline": {"kmeans_on_pixels": {"acc": 0.5}}}, "baseline"),
        ({"timing": 60.0}, "timing"),
        ({"timing": {"train_seconds": "long"}}, "timing"),
    ],
)
def test_runs_with_unexpected_results_are_left_out(tmp_path: Path, changes: dict, key: str) -> None:
    write_run(tmp_path / "good", baseline=None)
    write_run(tmp_path / "bad", seed=1)
    results = json.loads((tmp_path / "bad" / "results.json").read_text())
    (tmp_path / "bad" / "results.json").write_text(json.dumps(results | changes))
    comparison = compare(tmp_path)
    assert [row.folders for row in comparison.rows] == [("good",)]
    assert comparison.left_out == [("bad", f"results.json has an unexpected value of {key}")]


@pytest.mark.parametrize("text", ["[a=1, 'b", "a: 1", "", "3"])
def test_runs_with_broken_overrides_are_left_out(tmp_path: Path, text: str) -> None:
    write_run(tmp_path / "good")
    write_run(tmp_path / "bad", seed=1)
    (tmp_path / "bad" / ".hydra" / "overrides.yaml").write_text(text)
    comparison = compare(tmp_path)
    assert [row.folders for row in comparison.rows] == [("good",)]
    ((name, reason),) = comparison.left_out
    assert name == "bad" and reason.startswith(".hydra/overrides.yaml cannot be read: ")
