"""compare: made-up run folders against means and spreads worked out by hand."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from scipy import stats

from deepclust.commands.compare import main, published_figures
from deepclust.comparison.formats import to_csv, to_latex, to_markdown, to_text
from deepclust.comparison.html_page import to_html
from deepclust.comparison.table import Row, Score, compare, standings
from deepclust.errors import InputError

PUBLISHED = [
    {
        "method": "cc",
        "protocol": "merged",
        "backbone": "resnet34",
        "source": "the paper",
        "figures": {"digits": {"acc": 0.79, "nmi": 0.7, "spread": {"acc": 0.04}}, "mnist": {"acc": 0.5}},
    }
]
IGNORE = ["seed", "data_dir", "logger"]
OWN = {"acc": [0.80, 0.90, 0.85], "nmi": [0.70, 0.70, 0.70], "ari": [0.60, 0.66, 0.63]}


def write_run(folder: Path, *, overrides: list[str] | None = None, **changed: object) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("seed: 0\n")
    OmegaConf.save(OmegaConf.create(overrides or []), folder / ".hydra" / "overrides.yaml")
    results = {
        "format": 1,
        "method": "cc",
        "dataset": "digits",
        "backbone": "conv_small",
        "seed": 0,
        "num_clusters": 10,
        "epochs": 5,
        "scores": {"method": None, "kmeans": {"acc": 0.5, "nmi": 0.5, "ari": 0.5}},
        "timing": {"train_seconds": 60.0},
    }
    (folder / "results.json").write_text(json.dumps({**results, **changed}))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three seeds of cc and of propos, at different depths; one run stopped, one failed."""
    for seed in range(3):
        write_run(
            tmp_path / "multirun" / "day" / str(seed),
            overrides=["method=cc", f"seed={seed}"],
            seed=seed,
            scores={
                "method": {metric: values[seed] for metric, values in OWN.items()},
                "kmeans": {"acc": 0.4, "nmi": 0.4, "ari": 0.4},
            },
            timing={"train_seconds": 60.0 * (seed + 1)},
        )
        write_run(tmp_path / "outputs" / str(seed), overrides=["method=propos"], method="propos", seed=seed)
    for name in ("stopped", "failed"):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra" / "config.yaml").touch()
    (tmp_path / "failed" / "error.txt").write_text("Traceback\n  line 3\nRuntimeError: out of memory\n")
    (tmp_path / "failed" / "status.json").write_text('{\n "status": "failed"\n}')
    return tmp_path


def test_means_and_spreads_are_exact(runs: Path) -> None:
    rows = compare(runs, published=PUBLISHED, ignore=IGNORE).rows
    assert [(row.method, row.rule, row.seeds) for row in rows] == [
        ("cc", "method", 3),
        ("cc", "k-means", 3),
        ("cc", "published", None),
        ("propos", "k-means", 3),  # it has no rule of its own, and no published figures on digits
    ]
    own = rows[0]
    assert own.scores["acc"].mean == pytest.approx(0.85, abs=1e-12)
    assert own.scores["acc"].spread == pytest.approx(0.05, abs=1e-12)  # sqrt((0.05² + 0.05² + 0²) / 2)
    assert own.scores["nmi"].spread == pytest.approx(0, abs=1e-12)
    assert own.scores["ari"].spread == pytest.approx(0.03, abs=1e-12)
    assert own.minutes == pytest.approx(2)
    assert own.best == {"acc", "nmi", "ari"} and not rows[1].best and not rows[3].best


def test_stages_are_part_of_their_run(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "0", overrides=["method=scan"], method="scan")
    write_run(tmp_path / "sweep" / "0" / "before", method="scan_pretext")
    write_run(tmp_path / "sweep" / "0" / "clusters" / "kmeans-10-seed0", method="kmeans")
    (tmp_path / "sweep" / "1" / ".hydra").mkdir(parents=True)
    (tmp_path / "sweep" / "1" / ".hydra" / "config.yaml").touch()
    write_run(tmp_path / "sweep" / "1" / "before", method="scan_pretext")
    (tmp_path / "sweep" / "multirun.yaml").touch()

    found = compare(tmp_path / "sweep", published=[], ignore=IGNORE)
    assert [(row.method, row.folders) for row in found.rows] == [("scan", ("0",))]
    assert found.left_out == [("1", "unfinished: no results.json")]
    (named,) = compare(tmp_path / "sweep" / "1" / "before", published=[], ignore=IGNORE).rows
    assert named.method == "scan_pretext"


def test_published_figures_stand_beside_the_same_method_and_data_set(runs: Path) -> None:
    (found,) = (r for r in compare(runs, published=PUBLISHED, ignore=IGNORE).rows if r.rule == "published")
    assert found == Row(
        dataset="digits",
        method="cc",
        backbone="resnet34",
        num_clusters=None,
        epochs=None,
        settings="",
        rule="published",
        seeds=None,
        scores={"acc": Score(0.79, 0.04), "nmi": Score(0.7, None)},
        minutes=None,
        protocol="merged",
        source="the paper",
    )


def test_unfinished_runs_are_listed_with_the_reason(runs: Path) -> None:
    write_run(runs / "newer", format=2)
    write_run(runs / "partial")
    (runs / "partial" / "results.json").write_text('{"format": 1, "meth')
    write_run(runs / "older")
    (runs / "older" / "results.json").write_text('{"format": 1, "method": "cc"}')
    left_out = dict(compare(runs, published=[], ignore=IGNORE).left_out)
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
    ("changed", "key"),
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
def test_results_of_another_kind_are_left_out(tmp_path: Path, changed: dict, key: str) -> None:
    write_run(tmp_path / "good", baseline=None)
    write_run(tmp_path / "odd", seed=1)
    results = json.loads((tmp_path / "odd" / "results.json").read_text())
    (tmp_path / "odd" / "results.json").write_text(json.dumps(results | changed))
    found = compare(tmp_path, published=[], ignore=IGNORE)
    assert [row.folders for row in found.rows] == [("good",)]
    assert found.left_out == [("odd", f"results.json holds something else than expected as {key}")]


@pytest.mark.parametrize("text", ["[a=1, 'b", "a: 1", "", "3"])
def test_runs_with_broken_overrides_are_left_out(tmp_path: Path, text: str) -> None:
    write_run(tmp_path / "good")
    write_run(tmp_path / "odd", seed=1)
    (tmp_path / "odd" / ".hydra" / "overrides.yaml").write_text(text)
    found = compare(tmp_path, published=[], ignore=IGNORE)
    assert [row.folders for row in found.rows] == [("good",)]
    ((name, why),) = found.left_out
    assert name == "odd" and why.startswith(".hydra/overrides.yaml cannot be read: ")


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        (["method.temperature=0.5"], ["", "method.temperature=0.5"]),
        (["+experiment=long", "~callbacks.x"], ["", "experiment=long ~callbacks.x"]),
        (["method=cc", "dataset.num_clusters=10", "trainer.max_epochs=5"], [""]),  # told by the columns
        (["seed=4", "logger=wandb", "logger.project=a"], [""]),  # ignored
        (["logger_name=a"], ["", "logger_name=a"]),  # not a key below logger
    ],
)
def test_groups_differ_by_overrides(tmp_path: Path, overrides: list[str], settings: list[str]) -> None:
    write_run(tmp_path / "a", overrides=["views=digits"], seed=0)
    write_run(tmp_path / "b", overrides=["views=digits", *overrides], seed=1)
    rows = compare(tmp_path, published=[], ignore=IGNORE).rows
    assert [row.settings for row in rows] == settings  # views=digits is shared, so it says nothing
    assert all(row.seeds == 3 - len(rows) for row in rows)


@pytest.mark.parametrize("key", ["method", "dataset", "backbone", "num_clusters", "epochs"])
def test_groups_differ_by_what_was_run(tmp_path: Path, key: str) -> None:
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, **{key: 7 if key in ("num_clusters", "epochs") else "other"})
    rows = compare(tmp_path, published=[], ignore=IGNORE).rows
    assert [row.seeds for row in rows] == [1, 1]
    assert all(row.scores["acc"] == Score(0.5, None) for row in rows)  # one seed has no spread


def test_a_seed_counts_once(tmp_path: Path) -> None:
    for day, accuracy in (("2024-01-01", 0.1), ("2024-01-02", 0.7)):
        write_run(tmp_path / day, scores={"kmeans": {"acc": accuracy, "nmi": 0.5, "ari": 0.5}})
    found = compare(tmp_path, published=[], ignore=IGNORE)
    assert found.rows[0].scores["acc"] == Score(0.7, None)
    assert found.left_out == [("2024-01-01", "seed 0 is counted from 2024-01-02")]


def test_runs_without_labels_have_a_row_without_scores(tmp_path: Path) -> None:
    write_run(tmp_path / "a", scores=None)
    write_run(tmp_path / "b", scores={"method": None, "kmeans": None}, seed=1)
    found = compare(tmp_path, published=[], ignore=IGNORE)
    assert [(row.seeds, row.scores) for row in found.rows] == [(2, {})]
    assert "no scores" in to_markdown(found)


def test_the_searched_folder_may_be_the_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    assert compare(tmp_path / "run", published=[], ignore=IGNORE).rows[0].seeds == 1


def test_csv_parses_back(runs: Path) -> None:
    found = compare(runs, published=PUBLISHED, ignore=IGNORE)
    lines = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert len(lines) == len(found.rows)
    for line, row in zip(lines, found.rows, strict=True):
        assert (line["dataset"], line["method"], line["rule"]) == (row.dataset, row.method, row.rule)
        for metric in ("acc", "nmi", "ari"):
            score = row.scores.get(metric)
            assert line[metric] == ("" if score is None else str(score.mean))
            spread = None if score is None else score.spread
            assert line[f"{metric}_spread"] == ("" if spread is None else str(spread))


def test_markdown_parses_back(runs: Path) -> None:
    write_run(runs / "odd", overrides=["a='x|y'"], seed=5)
    text = to_markdown(compare(runs, published=PUBLISHED, ignore=IGNORE))
    table, notes = text.split("\n\n")
    lines = [[cell.strip() for cell in line.replace(r"\|", "¦").strip("|").split("|")] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    own = next(row for row in rows if row["Clusters by"] == "method")
    assert (own["ACC"], own["NMI"], own["ARI"]) == ("**85.0 ± 5.0**", "**70.0 ± 0.0**", "**63.0 ± 3.0**")
    published = next(row for row in rows if row["Clusters by"] == "published, merged [1]")
    assert (published["ACC"], published["NMI"], published["ARI"]) == ("79.0 ± 4.0", "70.0", "")
    assert "- [1] the paper\n" in notes and "- not in the table: stopped" in notes
    assert any(row["Settings"] == "a='x¦y'" for row in rows)


def test_text_shows_every_cell_and_markup_as_it_is(runs: Path) -> None:
    write_run(runs / "odd", overrides=["views=[bold]"], seed=5)
    text = to_text(compare(runs, published=PUBLISHED, ignore=IGNORE))
    for part in ("85.0 ± 5.0", "published, merged [1]", "[1] the paper", "views=[bold]", "out of memory"):
        assert part in text


def test_pixels_have_one_row_per_data_set(tmp_path: Path) -> None:
    for number, (method, seed) in enumerate([("cc", 0), ("cc", 1), ("drc", 1)]):
        baseline = {"kmeans_on_pixels": {"acc": 0.5 + 0.2 * seed, "nmi": 0.5, "ari": 0.5}}
        write_run(tmp_path / str(number), method=method, seed=seed, baseline=baseline)
    first = compare(tmp_path, published=[], ignore=IGNORE).rows[0]
    assert (first.method, first.rule, first.seeds) == ("k-means", "pixels", 2)
    assert first.scores["acc"].mean == pytest.approx(0.6)


def test_stages_before_count_as_time(tmp_path: Path) -> None:
    write_run(tmp_path / "a", timing={"train_seconds": 60.0, "earlier_seconds": 120.0})
    assert compare(tmp_path, published=[], ignore=IGNORE).rows[0].minutes == pytest.approx(3)


def test_paired_test_is_scipys_over_common_seeds(tmp_path: Path) -> None:
    accuracy = {
        "cc": [0.80, 0.90, 0.85, 0.1],
        "drc": [0.70, 0.75, 0.79],
        "propos": [0.9, 0.9],
        "byol": [0.7, 0.8, 0.75],
    }
    for method, values in accuracy.items():
        for seed, acc in enumerate(values[:3]):
            scores = {"method": {"acc": acc, "nmi": 0.5, "ari": 0.5}}
            write_run(tmp_path / f"{method}{seed}", method=method, seed=seed, scores=scores)
    rows = {row.method: row for row in compare(tmp_path, published=[], ignore=IGNORE).rows}
    assert all(row.p_value is None for row in rows.values())  # the best, propos, has two seeds only
    write_run(tmp_path / "propos2", method="propos", seed=2, scores={"method": {"acc": 0.95, "nmi": 0.5, "ari": 0.5}})
    rows = {row.method: row for row in compare(tmp_path, published=[], ignore=IGNORE).rows}
    expected = stats.ttest_rel([0.9, 0.9, 0.95], accuracy["drc"]).pvalue
    assert rows["drc"].p_value == pytest.approx(expected) and rows["propos"].p_value is None
    assert "paired t-test" in to_markdown(compare(tmp_path, published=[], ignore=IGNORE))


def test_says_where_runs_stand_to_published_spreads(runs: Path) -> None:
    said = standings(compare(runs, published=PUBLISHED, ignore=IGNORE).rows)
    assert said[0].startswith("digits, cc by method: ACC 85.0 ± 5.0 is above the published 79.0 ± 4.0")
    assert "cc by k-means: ACC 40.0 ± 0.0 is below" in said[1] and len(said) == 2  # NMI was published without


def test_latex_escapes_and_balances(runs: Path) -> None:
    write_run(runs / "odd", overrides=["a_b=50%"], seed=5)
    text = to_latex(compare(runs, published=PUBLISHED, ignore=IGNORE))
    assert r"a\_b=50\%" in text and r"\textbf{85.0 $\pm$ 5.0}" in text
    body = (
        text[text.index("Data set") : text.index(r"\bottomrule")].replace("\\toprule\n", "").replace("\\midrule\n", "")
    )
    assert len({line.count(" & ") for line in body.splitlines() if line != r"\toprule"}) == 1


def test_page_links_to_reports(runs: Path) -> None:
    (runs / "outputs" / "1" / "report.html").touch()
    text = to_html(compare(runs, published=PUBLISHED, ignore=IGNORE), runs, beside=runs / "tables")
    assert 'href="../outputs/1/report.html"' in text and "outputs/0/report" not in text
    assert text.count('class="bars"') == 1 and "<script" not in text and "http" not in text
    assert "85.0 ± 5.0" in text and "out of memory" in text


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        compare(tmp_path, published=[], ignore=IGNORE)
    with pytest.raises(InputError, match="is not a folder"):
        compare(tmp_path / "missing", published=[], ignore=IGNORE)


def run_main(*overrides: str) -> None:
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        main(compose("compare", [*overrides]))


def test_main_prints_or_writes(runs: Path, capsys: pytest.CaptureFixture) -> None:
    run_main(f"runs={runs}")
    assert "85.0 ± 5.0" in capsys.readouterr().out
    run_main(f"runs={runs}", "format=csv")
    printed = capsys.readouterr()
    assert printed.out.startswith("dataset,method") and "stopped" in printed.err
    for ending, start in (
        (".csv", "dataset,method"),
        (".md", "| Data set"),
        (".txt", "┏━"),
        (".tex", "% ACC"),
        (".html", "<!doctype"),
    ):
        file = runs / "new" / f"table{ending}"
        run_main(f"runs={runs}", f"output={file}")
        assert file.read_text(encoding="utf-8").startswith(start)
        assert str(file) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["runs=.", "format=pdf"], "format=pdf"),
        (["runs=.", "output=table.pdf"], "ends in '.pdf'"),
        (["runs=.", "output=table.csv", "format=html"], "format=html and output=table.csv disagree; expected csv"),
    ],
)
def test_main_names_what_is_wrong(overrides: list[str], what: str) -> None:
    with pytest.raises(InputError, match=what):
        run_main(*overrides)


def test_main_takes_a_format_that_agrees(runs: Path) -> None:
    run_main(f"runs={runs}", "format=csv", f"output={runs / 'table.csv'}")
    assert (runs / "table.csv").read_text().startswith("dataset,method")


def test_main_refuses_a_table_without_runs(runs: Path) -> None:
    with pytest.raises(InputError, match=r"no run for the table: \. \(unfinished: no results.json\)"):
        run_main(f"runs={runs / 'stopped'}")


def test_config_writes_nothing_beside_the_output() -> None:
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        cfg = compose("compare", return_hydra_config=True)
    assert cfg.hydra.output_subdir is None and cfg.hydra.run.dir == "."
    assert "handlers" not in cfg.hydra.job_logging


def test_published_figures_are_well_formed() -> None:
    seen = set()
    for entry in published_figures():
        assert set(entry) == {"method", "protocol", "backbone", "source", "figures"}
        assert entry["protocol"] in ("merged", "split")
        for dataset, figures in entry["figures"].items():
            seen.add((entry["method"], dataset))
            spread = figures.pop("spread", {})
            assert set(spread) <= set(figures) <= {"acc", "nmi", "ari"} and figures
            assert all(0 < value < 1 for value in figures.values())
            assert all(0 <= value < 0.1 for value in spread.values())
    assert {m for m, _ in seen} == {"propos", "cc", "drc", "digpro", "secu", "coke", "gcc", "scan", "lnscc"}


def test_imports_neither_torch_nor_lightning() -> None:
    code = "import sys, deepclust.commands.compare; sys.exit(bool({'torch', 'lightning', 'scipy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
