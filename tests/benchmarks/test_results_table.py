"""benchmarks/results_table.py: which runs it makes, that it goes on, and the figures that it gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.comparison.run_folders import write_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def results_table(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import results_table

    monkeypatch.setattr(results_table, "describe_machine", lambda: {"commit": "abc"})
    monkeypatch.setattr(results_table.time, "sleep", lambda seconds: None)
    return results_table


@pytest.fixture
def call(results_table, tmp_path, monkeypatch):
    """A function that calls the script with made-up runs, of which seed 9 fails; it gives the runs that were started
    and the figures."""

    def call(*arguments, commit="abc"):
        started = []

        def start(run, folder):
            started.append((run.dataset, run.method, run.seed))
            results_table.output_file(folder).parent.mkdir(parents=True, exist_ok=True)
            results_table.output_file(folder).write_text("the last words")
            if run.seed != 9:
                scores = {"acc": 0.5 + run.seed / 10, "nmi": 0.5, "ari": 0.25}
                changes = {"dataset": run.dataset, "method": run.method, "seed": run.seed, "epochs": 5 + run.seed}
                changes |= {"max_epochs": 100, "scores": {"method": scores, "kmeans": scores}}
                write_run(folder, command="train", commit=commit, baseline={"kmeans_on_pixels": scores}, **changes)
            return subprocess.Popen([sys.executable, "-c", f"exit({int(run.seed == 9)})"])

        monkeypatch.setattr(results_table.Run, "start", start)
        out = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["x", "--runs", str(tmp_path / "runs"), "--out", str(out), *arguments])
        results_table.main()
        return started, json.loads(out.read_text())

    return call


def test_every_method_is_run_on_digits_and_all_but_byol_on_usps(results_table):
    methods = results_table.METHODS
    runs = results_table.list_runs(["digits", "usps"], methods, [3])
    assert [run.method for run in runs if run.dataset == "digits"] == methods
    assert [run.method for run in runs if run.dataset == "usps"] == [name for name in methods if name != "byol"]


def test_it_leaves_finished_runs_as_they_are_and_summarises_all(call, capsys):
    chosen = ["--datasets", "digits", "--methods", "scc", "dec"]
    assert call(*chosen, "--seeds", "0,1", "--jobs", "3")[0] == [
        *(("digits", "scc", 0), ("digits", "scc", 1)),
        *(("digits", "dec", 0), ("digits", "dec", 1)),
    ]
    started, figures = call(*chosen, "--seeds", "0,1,2")
    assert started == [("digits", "scc", 2), ("digits", "dec", 2)]
    rows = {(row["method"], row["clusters_by"]): row for row in figures["rows"]}
    assert rows.keys() == {("k-means", "k-means on pixels")} | {
        (method, rule) for method in ("dec", "scc") for rule in ("own rule", "k-means")
    }
    row = rows["dec", "own rule"]
    assert row["seeds"] == [0, 1, 2] and row["train_seconds"] == 60
    expected = {"mean": 0.6, "standard_deviation": 0.1, "lowest": 0.5, "highest": 0.7}
    assert row["scores"]["acc"] == pytest.approx(expected)
    assert len(figures["runs"]) == 6 and {run["commit"] for run in figures["runs"]} == {"abc"}
    assert "| digits, dec " in capsys.readouterr().out


def test_a_run_that_fails_is_named_and_the_others_go_on(call, capsys):
    with pytest.raises(SystemExit, match="not finished: digits cc 9"):
        call("--datasets", "digits", "--methods", "cc", "--seeds", "9,0")
    assert "failed: the last words" in capsys.readouterr().out
    assert [seed for _, _, seed in call("--datasets", "digits", "--methods", "cc", "--seeds", "0")[0]] == []


def test_runs_of_another_commit_are_refused(call, capsys):
    call("--datasets", "digits", "--methods", "cc", "--seeds", "0", commit="other-dirty")
    with pytest.raises(SystemExit):
        call("--datasets", "digits", "--methods", "cc", "--seeds", "0")
    assert "run at commit other-dirty, and this is abc" in capsys.readouterr().err
