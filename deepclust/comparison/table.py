"""Rows of means and spreads over seeds, and what stands beside them."""

import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deepclust.comparison.finished_runs import IDENTITY, METRICS, Run, load, run_folders
from deepclust.errors import InputError

RULES = {"method": "method", "kmeans": "k-means"}  # key in results.json -> what the table calls it
PIXELS = "pixels"
LEAST_SEEDS = 3  # of which a test on differences can say anything


@dataclass(frozen=True)
class Score:
    """A score as a fraction; the spread is None where there is only one value."""

    mean: float
    spread: float | None


@dataclass(frozen=True)
class Row:
    """One line of the table: a rule's scores over the seeds of a group, or published figures."""

    dataset: str
    method: str
    backbone: str
    num_clusters: int | None
    epochs: int | None
    settings: str  # overrides that not all compared runs share
    rule: str  # "method", "k-means" or "published"; "" for runs without scores
    seeds: int | None
    scores: dict[str, Score]  # by metric; absent where unknown
    minutes: float | None  # mean training time
    protocol: str = ""  # of published figures: merged or split
    source: str = ""
    best: frozenset[str] = frozenset()  # metrics in which no other row of our runs on the data set is better
    folders: tuple[str, ...] = ()  # of the runs
    by_seed: Mapping[int, float] = field(default_factory=dict)  # ACC
    p_value: float | None = None  # of ACC being the best row's, where seeds allow to say


@dataclass(frozen=True)
class Comparison:
    """The table, and the run folders that are not in it, each with the reason."""

    rows: list[Row]
    left_out: list[tuple[str, str]]


def compare(runs: Path, *, published: Sequence[Mapping], ignore: Collection[str]) -> Comparison:
    """The table over all run folders below `runs`.

    `published` holds entries as in conf/published.yaml. Overrides of the keys in `ignore`, or below them, do
    not make another group. Raises InputError where `runs` is no folder or holds no run.
    """
    finished, left_out = [], []
    for folder in run_folders(runs):
        name = folder.relative_to(runs).as_posix()
        run = load(folder, name=name)
        if isinstance(run, Run):
            finished.append(run)
        else:
            left_out.append((name, run))
    if not finished and not left_out:
        raise InputError(
            f"runs={runs} {'holds no run' if runs.is_dir() else 'is not a folder'}",
            expected="a folder with folders that hold results.json or .hydra/config.yaml",
            do="name the folder that the runs were written to, for example runs=outputs",
        )
    groups, repeated = _groups(finished, ignore)
    rows = [row for key in sorted(groups) for row in _rows_of(groups[key], settings=key[-1])]
    rows = _with_p_values(_with_best(_pixel_rows(finished) + rows))
    table = sorted(rows + _published_rows(published, rows), key=lambda row: row.dataset)
    table.sort(key=lambda row: (row.dataset, row.rule != PIXELS, row.method))
    return Comparison(table, sorted(left_out + repeated))


def _groups(runs: Sequence[Run], ignore: Collection[str]) -> tuple[dict[tuple, list[Run]], list[tuple[str, str]]]:
    """Runs by (data set, method, ..., settings); and the runs whose seed a later one of the group has too."""
    told = [_telling(run, ignore) for run in runs]
    shared = set.intersection(*(set(overrides.items()) for overrides in told)) if told else set()
    groups: dict[tuple, dict[int, Run]] = defaultdict(dict)
    repeated = []
    for run, overrides in zip(runs, told, strict=True):
        settings = " ".join(f"{k}={v}" if v else k for k, v in sorted(set(overrides.items()) - shared))
        group = groups[*(run.results[key] for key in IDENTITY), settings]
        seed = run.results["seed"]
        if seed in group:  # averaged in, it would make the spread look smaller than it is
            repeated.append((group[seed].folder, f"seed {seed} is counted from {run.folder}"))
        group[seed] = run
    return {key: list(members.values()) for key, members in groups.items()}, repeated


def _telling(run: Run, ignore: Collection[str]) -> dict[str, str]:
    """The overrides that say more than the identity does: not method=cc where the method is cc anyway."""
    kept = {}
    for key, value in run.overrides.items():
        known_as = key.rpartition(".")[2].removeprefix("max_")
        if known_as in IDENTITY and value == str(run.results[known_as]):
            continue
        if not any(key == name or key.startswith(f"{name}.") for name in ignore):
            kept[key] = value
    return kept


def _rows_of(runs: Sequence[Run], *, settings: str) -> list[Row]:
    """One row per rule that has scores, or one without."""
    first = runs[0].results
    timings = [t for run in runs if (t := run.results["timing"] or {}).get("train_seconds") is not None]
    seconds = [t["train_seconds"] + (t.get("earlier_seconds") or 0.0) for t in timings]  # with the stages before
    blank = Row(
        **{key: first[key] for key in IDENTITY},
        settings=settings,
        folders=tuple(run.folder for run in runs),
        rule="",
        seeds=len(runs),
        scores={},
        minutes=statistics.fmean(seconds) / 60 if seconds else None,
    )
    rows = []
    for rule, name in RULES.items():
        known = {run.results["seed"]: s for run in runs if (s := (run.results["scores"] or {}).get(rule))}
        if known:
            rows.append(replace(blank, rule=name, **_over_seeds(known)))
    return rows or [blank]


def _pixel_rows(runs: Sequence[Run]) -> list[Row]:
    """k-means on the pixels of every data set, as the runs on it have measured it; a seed counts once."""
    found: dict[str, dict[int, Mapping]] = defaultdict(dict)
    clusters = {}
    for run in runs:
        if scores := (run.results.get("baseline") or {}).get("kmeans_on_pixels"):
            found[run.results["dataset"]][run.results["seed"]] = scores
            clusters[run.results["dataset"]] = run.results["num_clusters"]
    return [
        Row(dataset, "k-means", "", clusters[dataset], None, "", PIXELS, minutes=None, **_over_seeds(known))
        for dataset, known in found.items()
    ]


def _over_seeds(known: Mapping[int, Mapping]) -> dict[str, Any]:
    """What a row says of scores by seed."""
    return {
        "seeds": len(known),
        "scores": {m: _score([s[m] for s in known.values()]) for m in METRICS},
        "by_seed": {seed: s["acc"] for seed, s in known.items()},
    }


def _score(values: Sequence[float]) -> Score:
    return Score(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _with_best(rows: Sequence[Row]) -> list[Row]:
    top: dict[tuple[str, str], float] = defaultdict(lambda: -1.0)  # the least that ARI can be
    for row in rows:
        for metric, score in row.scores.items():
            top[row.dataset, metric] = max(top[row.dataset, metric], score.mean)
    return [
        replace(row, best=frozenset(m for m, s in row.scores.items() if s.mean >= top[row.dataset, m])) for row in rows
    ]


def _with_p_values(rows: Sequence[Row]) -> list[Row]:
    """Rows with the p-value of a two-sided paired t-test on ACC, over the seeds in common, against the best row.

    Best is the largest mean ACC on the data set. None below `LEAST_SEEDS` common seeds, and where the differences
    are all the same. Not corrected for the number of rows.
    """
    best = {row.dataset: row for row in rows if "acc" in row.best}
    return [replace(row, p_value=_paired_p(row, best[row.dataset])) if row.dataset in best else row for row in rows]


def _paired_p(row: Row, best: Row) -> float | None:
    common = sorted(row.by_seed.keys() & best.by_seed.keys())
    differences = [best.by_seed[seed] - row.by_seed[seed] for seed in common]
    if row is best or len(common) < LEAST_SEEDS or len(set(differences)) == 1:
        return None
    from scipy import stats  # a second to import, for those only who have the seeds

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def standings(rows: Sequence[Row]) -> list[str]:
    """Where the runs stand to published figures that have a spread, a sentence for each metric of each row."""
    said = []
    for row in rows:
        for known in rows:
            if known.rule != "published" or (known.dataset, known.method) != (row.dataset, row.method):
                continue
            for metric, figure in known.scores.items():
                if figure.spread is None or row.rule in ("published", "") or metric not in row.scores:
                    continue
                gap = row.scores[metric].mean - figure.mean
                where = "inside" if abs(gap) <= figure.spread else "above" if gap > 0 else "below"
                settings = f" ({row.settings})" if row.settings else ""
                own = f"{metric.upper()} {percent(row.scores[metric])}"
                said.append(
                    f"{row.dataset}, {row.method} by {row.rule}{settings}: {own} "
                    f"is {where} the published {percent(figure)} ({known.backbone}, {known.protocol})"
                )
    return said


def percent(score: Score | None) -> str:
    if score is None:
        return ""
    mean = f"{100 * score.mean:.1f}"
    return mean if score.spread is None else f"{mean} ± {100 * score.spread:.1f}"


def _published_rows(published: Sequence[Mapping], rows: Sequence[Row]) -> list[Row]:
    """The published figures of every method on every data set that has a row."""
    wanted = dict.fromkeys((row.dataset, row.method) for row in rows)
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
            scores={m: Score(f[m], f.get("spread", {}).get(m)) for m in METRICS if m in f},
            minutes=None,
            protocol=entry["protocol"],
            source=entry["source"],
        )
        for dataset, method in wanted
        for entry in published
        if entry["method"] == method and (f := entry["figures"].get(dataset))
    ]
