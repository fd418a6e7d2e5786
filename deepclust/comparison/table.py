"""The rows of a comparison: means and spreads over seeds, p-values, and published figures of the same methods."""

import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deepclust.comparison.finished_runs import (
    IDENTITY_KEYS,
    FinishedRun,
    find_run_folders,
    read_finished_run,
)
from deepclust.errors import InputError
from deepclust.score_names import SCORE_NAMES

RULE_NAMES = {"method": "method", "kmeans": "k-means"}  # key in results.json -> name in the table
PIXELS = "pixels"
MIN_SEEDS = 3  # in common, for a test of a difference


@dataclass(frozen=True)
class Score:
    """A score as a fraction."""

    mean: float
    spread: float | None  # None for a single value


@dataclass(frozen=True)
class Row:
    """One row of the table: the scores of a rule over the seeds of a group of runs, or published figures."""

    dataset: str
    method: str
    backbone: str
    num_clusters: int | None
    epochs: int | None
    settings: str  # overrides that not all compared runs share
    rule: str  # "method", "k-means", "pixels" or "published"; "" for runs without scores
    seeds: int | None
    scores: dict[str, Score]  # by metric; a missing metric is unknown
    minutes: float | None  # mean training time
    protocol: str = ""  # of published figures: merged or split
    source: str = ""  # of published figures
    best: frozenset[str] = frozenset()  # metrics in which no other row of our runs on the data set is better
    folders: tuple[str, ...] = ()  # of the runs
    scores_by_seed: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # by seed and metric
    p_value: float | None = None  # of the hypothesis that ACC equals that of the best row; None with too few seeds


@dataclass(frozen=True)
class Comparison:
    """A table over runs."""

    rows: list[Row]
    left_out: list[tuple[str, str]]  # run folders that are not in the table, each with the reason


def compare_runs(runs: Path, *, published: Sequence[Mapping], ignore: Collection[str]) -> Comparison:
    """Return the table over all run folders below `runs`.

    published: entries as in conf/published.yaml.
    ignore: keys whose overrides do not make another group; so do the keys below them.

    Raises:
        InputError: if `runs` is not a folder or holds no run.
    """
    finished, left_out = [], []
    for folder in find_run_folders(runs):
        name = folder.relative_to(runs).as_posix()
        run = read_finished_run(folder, name=name)
        if isinstance(run, FinishedRun):
            finished.append(run)
        else:
            left_out.append((name, run))
    if not finished and not left_out:
        raise InputError(
            f"runs={runs} {'holds no run' if runs.is_dir() else 'is not a folder'}",
            expected="a folder with folders that hold results.json or .hydra/config.yaml",
            do="name the folder that the runs were written to, for example runs=outputs",
        )
    groups, repeated = _group_runs(finished, ignore)
    rows = [row for key in sorted(groups) for row in _make_rows(groups[key], settings=key[-1])]
    rows = _add_p_values(_mark_best_scores(_make_pixel_rows(finished) + rows))
    rows += _make_published_rows(published, rows)
    rows.sort(key=lambda row: (row.dataset, row.rule != PIXELS, row.method))
    return Comparison(rows, sorted(left_out + repeated))


def _group_runs(
    runs: Sequence[FinishedRun], ignore: Collection[str]
) -> tuple[dict[tuple, list[FinishedRun]], list[tuple[str, str]]]:
    """Return groups of runs by (data set, method, ..., settings), and the left-out runs, each with the reason.

    A run is left out if a later one of its group has the same seed.
    """
    overrides_of_runs = [_select_overrides(run, ignore) for run in runs]
    shared = set.intersection(*(set(overrides.items()) for overrides in overrides_of_runs)) if runs else set()
    groups: dict[tuple, dict[int, FinishedRun]] = defaultdict(dict)
    repeated = []
    for run, overrides in zip(runs, overrides_of_runs, strict=True):
        settings = " ".join(f"{k}={v}" if v else k for k, v in sorted(set(overrides.items()) - shared))
        identity = run.results | {"epochs": run.results.get("max_epochs", run.results["epochs"])}
        group = groups[*(identity[key] for key in IDENTITY_KEYS), settings]
        seed = run.results["seed"]
        if seed in group:  # the same seed twice would make the spread look smaller than it is
            repeated.append((group[seed].folder, f"seed {seed} is taken from {run.folder}"))
        group[seed] = run
    return {key: list(members.values()) for key, members in groups.items()}, repeated


def _select_overrides(run: FinishedRun, ignore: Collection[str]) -> dict[str, str]:
    """Return the overrides that are not ignored and that do not repeat a column of the table, as method=cc does."""
    selected = {}
    for key, value in run.overrides.items():
        results_key = key.rpartition(".")[2].removeprefix("max_")
        if results_key in IDENTITY_KEYS and value == str(run.results[results_key]):
            continue
        if not any(key == name or key.startswith(f"{name}.") for name in ignore):
            selected[key] = value
    return selected


def _make_rows(runs: Sequence[FinishedRun], *, settings: str) -> list[Row]:
    """Return a row for each rule that has scores, or one row without scores."""
    first = runs[0].results
    epochs = {run.results["epochs"] for run in runs}
    timings = [t for run in runs if (t := run.results["timing"] or {}).get("train_seconds") is not None]
    seconds = [t["train_seconds"] + (t.get("earlier_seconds") or 0.0) for t in timings]  # with earlier stages
    row_without_scores = Row(
        **{key: first[key] for key in IDENTITY_KEYS} | {"epochs": epochs.pop() if len(epochs) == 1 else None},
        settings=settings,
        folders=tuple(run.folder for run in runs),
        rule="",
        seeds=len(runs),
        scores={},
        minutes=statistics.fmean(seconds) / 60 if seconds else None,
    )
    rows = []
    for rule, name in RULE_NAMES.items():
        by_seed = {run.results["seed"]: s for run in runs if (s := (run.results["scores"] or {}).get(rule))}
        if by_seed:
            rows.append(replace(row_without_scores, rule=name, **_summarize_over_seeds(by_seed)))
    return rows or [row_without_scores]


def _make_pixel_rows(runs: Sequence[FinishedRun]) -> list[Row]:
    """Return a row for k-means on the pixels of each data set, as the runs have measured it; a seed counts once."""
    by_dataset: dict[str, dict[int, Mapping]] = defaultdict(dict)
    num_clusters = {}
    for run in runs:
        if scores := (run.results.get("baseline") or {}).get("kmeans_on_pixels"):
            by_dataset[run.results["dataset"]][run.results["seed"]] = scores
            num_clusters[run.results["dataset"]] = run.results["num_clusters"]
    return [
        Row(
            dataset=dataset,
            method="k-means",
            backbone="",
            num_clusters=num_clusters[dataset],
            epochs=None,
            settings="",
            rule=PIXELS,
            minutes=None,
            **_summarize_over_seeds(by_seed),
        )
        for dataset, by_seed in by_dataset.items()
    ]


def _summarize_over_seeds(scores_by_seed: Mapping[int, Mapping]) -> dict[str, Any]:
    """Return the fields of a row that follow from the scores of each seed."""
    return {
        "seeds": len(scores_by_seed),
        "scores": {m: _summarize([scores[m] for scores in scores_by_seed.values()]) for m in SCORE_NAMES},
        "scores_by_seed": scores_by_seed,
    }


def _summarize(values: Sequence[float]) -> Score:
    """Return mean and sample standard deviation."""
    return Score(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _mark_best_scores(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with `best` filled in."""
    highest: dict[tuple[str, str], float] = defaultdict(lambda: -1.0)  # the lowest value that ARI can have
    for row in rows:
        for metric, score in row.scores.items():
            highest[row.dataset, metric] = max(highest[row.dataset, metric], score.mean)
    return [
        replace(row, best=frozenset(m for m, s in row.scores.items() if s.mean >= highest[row.dataset, m]))
        for row in rows
    ]


def _add_p_values(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the p-value of a two-sided paired t-test on ACC against the best row, over common seeds.

    The best row has the largest mean ACC on the data set. There is no p-value with fewer than MIN_SEEDS common seeds or
    if the differences are all the same. The p-values are not corrected for the number of rows.
    """
    best = {row.dataset: row for row in rows if "acc" in row.best}
    return [
        replace(row, p_value=_compute_p_value(row, best[row.dataset])) if row.dataset in best else row for row in rows
    ]


def _compute_p_value(row: Row, best: Row) -> float | None:
    common_seeds = sorted(row.scores_by_seed.keys() & best.scores_by_seed.keys())
    differences = [best.scores_by_seed[seed]["acc"] - row.scores_by_seed[seed]["acc"] for seed in common_seeds]
    if row is best or len(common_seeds) < MIN_SEEDS or len(set(differences)) == 1:
        return None
    from scipy import stats  # its import takes a second, which only those pay who have enough seeds

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def compare_to_published(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each score of our runs and each published figure of the same metric that has a spread."""
    sentences = []
    for row in rows:
        for published in rows:
            if published.rule != "published" or (published.dataset, published.method) != (row.dataset, row.method):
                continue
            for metric, figure in published.scores.items():
                if figure.spread is None or row.rule in ("published", "") or metric not in row.scores:
                    continue
                difference = row.scores[metric].mean - figure.mean
                relation = "inside" if abs(difference) <= figure.spread else "above" if difference > 0 else "below"
                settings = f" ({row.settings})" if row.settings else ""
                score = f"{metric.upper()} {format_percent(row.scores[metric])}"
                sentences.append(
                    f"{row.dataset}, {row.method} by {row.rule}{settings}: {score} is {relation} the published "
                    f"{format_percent(figure)} ({published.backbone}, {published.protocol})"
                )
    return sentences


def format_percent(score: Score | None) -> str:
    """Return `mean ± spread` in percent; nothing if there is no score."""
    if score is None:
        return ""
    mean = f"{100 * score.mean:.1f}"
    return mean if score.spread is None else f"{mean} ± {100 * score.spread:.1f}"


def _make_published_rows(published: Sequence[Mapping], rows: Sequence[Row]) -> list[Row]:
    """Return the published figures of each pair of method and data set that has a row."""
    pairs = dict.fromkeys((row.dataset, row.method) for row in rows)
    return [
        Row(
            dataset=dataset,
            method=method,
            backbone=entry["backbone"],
            num_clusters=None,
            epochs=None,
            settings="",
            rule="published",
            seeds=None,
            scores={m: Score(f[m], f.get("spread", {}).get(m)) for m in SCORE_NAMES if m in f},
            minutes=None,
            protocol=entry["protocol"],
            source=entry["source"],
        )
        for dataset, method in pairs
        for entry in published
        if entry["method"] == method and (f := entry["figures"].get(dataset))
    ]
