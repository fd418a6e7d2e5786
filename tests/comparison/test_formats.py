"""A comparison as CSV, Markdown, plain text and LaTeX."""

import csv
import io
from pathlib import Path

from deepclust.comparison.formats import to_csv, to_latex, to_markdown, to_text
from tests.comparison.run_folders import PUBLISHED, compare, write_run


def test_csv_parses_back(example_runs: Path) -> None:
    comparison = compare(example_runs, published=PUBLISHED)
    lines = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert len(lines) == len(comparison.rows)
    for line, row in zip(lines, comparison.rows, strict=True):
        assert (line["dataset"], line["method"], line["rule"]) == (row.dataset, row.method, row.rule)
        for metric in ("acc", "nmi", "ari"):
            score = row.scores.get(metric)
            assert line[metric] == ("" if score is None else str(score.mean))
            spread = None if score is None else score.spread
            assert line[f"{metric}_spread"] == ("" if spread is None else str(spread))


def test_markdown_parses_back(example_runs: Path) -> None:
    write_run(example_runs / "odd", overrides=["a='x|y'"], seed=5)
    text = to_markdown(compare(example_runs, published=PUBLISHED))
    table, notes = text.split("\n\n")
    lines = [[cell.strip() for cell in line.replace(r"\|", "¦").strip("|").split("|")] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    by_method = next(row for row in rows if row["Clusters by"] == "method")
    assert (by_method["ACC"], by_method["NMI"], by_method["ARI"]) == (
        "**85.0 ± 5.0**",
        "**70.0 ± 0.0**",
        "**63.0 ± 3.0**",
    )
    published = next(row for row in rows if row["Clusters by"] == "published, merged [1]")
    assert (published["ACC"], published["NMI"], published["ARI"]) == ("79.0 ± 4.0", "70.0", "")
    assert "- [1] the paper\n" in notes and "- not in the table: stopped" in notes
    assert any(row["Settings"] == "a='x¦y'" for row in rows)


def test_runs_without_labels_have_a_row_without_scores(tmp_path: Path) -> None:
    write_run(tmp_path / "a", scores=None)
    write_run(tmp_path / "b", scores={"method": None, "kmeans": None}, seed=1)
    comparison = compare(tmp_path)
    assert [(row.seeds, row.scores) for row in comparison.rows] == [(2, {})]
    assert "no scores" in to_markdown(comparison)


def test_the_paired_test_is_explained_where_there_is_one(example_runs: Path) -> None:
    assert "paired t-test" in to_markdown(compare(example_runs))
    assert "paired t-test" not in to_markdown(
        compare(example_runs / "outputs")
    )  # one row has nothing to be tested against


def test_text_shows_every_cell_and_markup_as_it_is(example_runs: Path) -> None:
    write_run(example_runs / "odd", overrides=["views=[bold]"], seed=5)
    text = to_text(compare(example_runs, published=PUBLISHED))
    for part in ("85.0 ± 5.0", "published, merged [1]", "[1] the paper", "views=[bold]", "out of memory"):
        assert part in text


def test_latex_escapes_and_balances(example_runs: Path) -> None:
    write_run(example_runs / "odd", overrides=["a_b=50%"], seed=5)
    text = to_latex(compare(example_runs, published=PUBLISHED))
    assert r"a\_b=50\%" in text and r"\textbf{85.0 $\pm$ 5.0}" in text
    body = text[text.index("Data set") : text.index(r"\bottomrule")]
    lines = body.replace("\\toprule\n", "").replace("\\midrule\n", "").splitlines()
    assert len({line.count(" & ") for line in lines}) == 1
