"""The verb compare: what it prints, writes and refuses, and the published figures."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from deepclust.commands.compare import main, read_published_figures
from deepclust.errors import InputError
from tests.comparison.run_folders import write_example_runs


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with the example runs."""
    write_example_runs(tmp_path)
    return tmp_path


def run_compare(*overrides: str) -> None:
    """Run `deepclust compare OVERRIDES`."""
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        main(compose("compare", [*overrides]))


def test_main_prints_or_writes(runs: Path, capsys: pytest.CaptureFixture) -> None:
    run_compare(f"runs={runs}")
    assert "85.0 ± 5.0" in capsys.readouterr().out
    run_compare(f"runs={runs}", "format=csv")
    printed = capsys.readouterr()
    assert printed.out.startswith("dataset,method") and "stopped" in printed.err
    for suffix, start in (
        (".csv", "dataset,method"),
        (".md", "| Data set"),
        (".txt", "┏━"),
        (".tex", "% ACC"),
        (".html", "<!doctype"),
    ):
        file = runs / "new" / f"table{suffix}"
        run_compare(f"runs={runs}", f"output={file}")
        assert file.read_text(encoding="utf-8").startswith(start)
        assert str(file) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["runs=.", "format=pdf"], "format=pdf"),
        (["runs=.", "output=table.pdf"], "ends in '.pdf'"),
        (["runs=.", "output=table.csv", "format=html"], "format=html and output=table.csv disagree; expected csv"),
    ],
)
def test_main_names_what_is_wrong(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_compare(*overrides)


def test_main_takes_a_format_that_agrees(runs: Path) -> None:
    run_compare(f"runs={runs}", "format=csv", f"output={runs / 'table.csv'}")
    assert (runs / "table.csv").read_text().startswith("dataset,method")


def test_a_named_format_serves_files_whose_ending_says_nothing(runs: Path) -> None:
    run_compare(f"runs={runs}", "format=csv", f"output={runs / 'table.data'}")
    assert (runs / "table.data").read_text().startswith("dataset,method")


def test_main_refuses_a_table_without_runs(runs: Path) -> None:
    with pytest.raises(InputError, match=r"no run for the table: \. \(unfinished: no results.json\)"):
        run_compare(f"runs={runs / 'stopped'}")


def test_config_writes_nothing_beside_the_output() -> None:
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        cfg = compose("compare", return_hydra_config=True)
    assert cfg.hydra.output_subdir is None and cfg.hydra.run.dir == "."
    assert "handlers" not in cfg.hydra.job_logging


def test_published_figures_are_well_formed() -> None:
    methods = set()
    for entry in read_published_figures():
        assert set(entry) == {"method", "protocol", "backbone", "source", "figures"}
        assert entry["protocol"] in ("merged", "split")
        for figures in entry["figures"].values():
            methods.add(entry["method"])
            spread = figures.pop("spread", {})
            assert set(spread) <= set(figures) <= {"acc", "nmi", "ari"} and figures
            assert all(0 < value < 1 for value in figures.values())
            assert all(0 <= value < 0.1 for value in spread.values())
    assert methods == {"propos", "cc", "drc", "digpro", "secu", "coke", "gcc", "scan", "lnscc", "decs", "tcc"}


def test_imports_neither_torch_nor_lightning() -> None:
    code = "import sys, deepclust.commands.compare; sys.exit(bool({'torch', 'lightning', 'scipy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
