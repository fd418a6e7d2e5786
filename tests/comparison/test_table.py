"""The rows of a comparison: groups of runs, with means and spreads that were worked out by hand."""

from pathlib import Path

import pytest
from scipy import stats

from deepclust.comparison.table import Row, Score, compare_to_published
from deepclust.errors import InputError
from tests.comparison.run_folders import PUBLISHED, compare, write_run


def test_means_and_spreads_are_exact(example_runs: Path) -> None:
    rows = compare(example_runs, published=PUBLISHED).rows
    assert [(row.method, row.rule, row.seeds) for row in rows] == [
        ("cc", "method", 3),
        ("cc", "k-means", 3),
        ("cc", "published", None),
        ("propos", "k-means", 3),  # it has no rule of its own, and no published figures on digits
    ]
    by_method = rows[0]
    assert by_method.scores["acc"].mean == pytest.approx(0.85, abs=1e-12)
    assert by_method.scores["acc"].spread == pytest.approx(0.05, abs=1e-12)  # sqrt((0.05² + 0.05² + 0²) / 2)
    assert by_method.scores["nmi"].spread == pytest.approx(0, abs=1e-12)
    assert by_method.scores["ari"].spread == pytest.approx(0.03, abs=1e-12)
    assert by_method.minutes == pytest.approx(2)
    assert by_method.best == {"acc", "nmi", "ari"} and not rows[1].best and not rows[3].best


def test_published_figures_stand_beside_the_same_method_and_data_set(example_runs: Path) -> None:
    (row,) = (row for row in compare(example_runs, published=PUBLISHED).rows if row.rule == "published")
    assert row == Row(
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


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        (["method.temperature=0.5"], ["", "method.temperature=0.5"]),
        (["+experiment=long", "~callbacks.x"], ["", "experiment=long ~callbacks.x"]),
        (["method=cc", "dataset.num_clusters=10", "trainer.max_epochs=5"], [""]),  # in columns of their own
        (["seed=4", "logger=wandb", "logger.project=a"], [""]),  # ignored
        (["logger_name=a"], ["", "logger_name=a"]),  # not a key below logger
    ],
)
def test_groups_differ_by_overrides(tmp_path: Path, overrides: list[str], settings: list[str]) -> None:
    write_run(tmp_path / "a", overrides=["views=digits"], seed=0)
    write_run(tmp_path / "b", overrides=["views=digits", *overrides], seed=1)
    rows = compare(tmp_path).rows
    assert [row.settings for row in rows] == settings  # views=digits is left out because all runs share it
    assert all(row.seeds == 3 - len(rows) for row in rows)


def test_runs_that_ended_by_themselves_are_one_group(tmp_path: Path) -> None:
    for seed, epochs in enumerate((5, 7)):
        write_run(tmp_path / str(seed), seed=seed, epochs=epochs, max_epochs=20)
    write_run(tmp_path / "longer", epochs=7, max_epochs=30)
    rows = compare(tmp_path).rows
    assert [(row.seeds, row.epochs) for row in rows] == [(2, None), (1, 7)]


@pytest.mark.parametrize("key", ["method", "dataset", "backbone", "num_clusters", "epochs"])
def test_groups_differ_by_what_was_run(tmp_path: Path, key: str) -> None:
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, **{key: 7 if key in ("num_clusters", "epochs") else "other"})
    rows = compare(tmp_path).rows
    assert [row.seeds for row in rows] == [1, 1]
    assert all(row.scores["acc"] == Score(0.5, None) for row in rows)  # one seed has no spread


def test_a_seed_counts_once(tmp_path: Path) -> None:
    for day, accuracy in (("2024-01-01", 0.1), ("2024-01-02", 0.7)):
        write_run(tmp_path / day, scores={"kmeans": {"acc": accuracy, "nmi": 0.5, "ari": 0.5}})
    comparison = compare(tmp_path)
    assert comparison.rows[0].scores["acc"] == Score(0.7, None)
    assert comparison.left_out == [("2024-01-01", "seed 0 is taken from 2024-01-02")]


def test_pixels_have_one_row_per_data_set(tmp_path: Path) -> None:
    for number, (method, seed) in enumerate([("cc", 0), ("cc", 1), ("drc", 1)]):
        baseline = {"kmeans_on_pixels": {"acc": 0.5 + 0.2 * seed, "nmi": 0.5, "ari": 0.5}}
        write_run(tmp_path / str(number), method=method, seed=seed, baseline=baseline)
    first = compare(tmp_path).rows[0]
    assert (first.method, first.rule, first.seeds) == ("k-means", "pixels", 2)
    assert first.scores["acc"].mean == pytest.approx(0.6)


def test_earlier_stages_count_as_time(tmp_path: Path) -> None:
    write_run(tmp_path / "a", timing={"train_seconds": 60.0, "earlier_seconds": 120.0})
    assert compare(tmp_path).rows[0].minutes == pytest.approx(3)


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
    rows = {row.method: row for row in compare(tmp_path).rows}
    assert all(row.p_value is None for row in rows.values())  # the best, propos, has two seeds only
    write_run(tmp_path / "propos2", method="propos", seed=2, scores={"method": {"acc": 0.95, "nmi": 0.5, "ari": 0.5}})
    rows = {row.method: row for row in compare(tmp_path).rows}
    expected = stats.ttest_rel([0.9, 0.9, 0.95], accuracy["drc"]).pvalue
    assert rows["drc"].p_value == pytest.approx(expected) and rows["propos"].p_value is None


def test_runs_are_compared_to_published_figures_with_a_spread(example_runs: Path) -> None:
    sentences = compare_to_published(compare(example_runs, published=PUBLISHED).rows)
    assert sentences[0].startswith("digits, cc by method: ACC 85.0 ± 5.0 is above the published 79.0 ± 4.0")
    assert "cc by k-means: ACC 40.0 ± 0.0 is below" in sentences[1]
    assert len(sentences) == 2  # NMI was published without a spread


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        compare(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        compare(tmp_path / "missing")
