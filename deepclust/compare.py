"""`deepclust compare`: many runs -> one table of means and spreads over seeds, beside published figures.

Runs are grouped by what was run: data set, method, backbone, number of clusters, epochs, and every other
override that is not ignored. The spread is the sample standard deviation over seeds.
"""

import csv
import io
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import compress
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepclust.errors import InputError

METRICS = ("acc", "nmi", "ari")
RULES = {"method": "method", "kmeans": "k-means"}  # key in results.json -> what the table calls it
IDENTITY = ("dataset", "method", "backbone", "num_clusters", "epochs")
ENDINGS = {".txt": "text", ".md": "markdown", ".csv": "csv"}
COLUMNS = ["Data set", "Method", "Backbone", "K", "Epochs", "Settings", "Clusters by"]
COLUMNS += [*(metric.upper() for metric in METRICS), "Seeds", "Minutes"]
TEXTS = {"Data set", "Method", "Backbone", "Settings", "Clusters by"}  # the rest are numbers
FILE_WIDTH = 200  # characters; what a terminal would tell otherwise


@dataclass(frozen=True)
class Run:
    """A finished run: its folder below the searched one, its results.json, its overrides by key."""

    folder: str
    results: dict
    overrides: dict[str, str]


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
    for folder in _run_folders(runs):
        name = folder.relative_to(runs).as_posix()
        run = _load(folder, name=name)
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
    rows = _with_best([row for key in sorted(groups) for row in _rows_of(groups[key], settings=key[-1])])
    table = sorted(rows + _published_rows(published, rows), key=lambda row: (row.dataset, row.method))
    return Comparison(table, sorted(left_out + repeated))


def _run_folders(top: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(top):
        folder = Path(path)
        if "results.json" in files or (folder / ".hydra" / "config.yaml").is_file():
            yield folder
        folders[:] = sorted(f for f in folders if not f.startswith("."))


def _load(folder: Path, *, name: str) -> Run | str:
    """The finished run in `folder`, or why there is none."""
    file = folder / "results.json"
    if not file.is_file():
        return "; ".join(["unfinished: no results.json", *_last_words(folder)])
    try:
        results = json.loads(file.read_text())
    except ValueError as error:
        return f"results.json cannot be read: {error}"
    if not isinstance(results, dict) or results.get("format") != 1:
        return "results.json is not of format 1"
    lacking = [key for key in (*IDENTITY, "seed", "scores", "timing") if key not in results]
    if lacking:
        return f"results.json lacks {', '.join(lacking)}"
    return Run(name, results, _overrides(folder / ".hydra" / "overrides.yaml"))


def _last_words(folder: Path) -> Iterator[str]:
    """What an unfinished run left about its end."""
    for name in ("status.json", "error.txt"):
        if (folder / name).is_file():
            text = " ".join((folder / name).read_text(errors="replace").split())
            yield f"{name}: {text[-200:]}"  # a traceback says the most at its end


def _overrides(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    texts = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(texts, list)  # Hydra writes nothing else
    pairs = (str(text).lstrip("+").partition("=") for text in texts)
    return {key: value for key, _, value in pairs}


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
    seconds = [t["train_seconds"] + t.get("earlier_seconds", 0.0) for t in timings]  # with the stages before
    blank = Row(
        **{key: first[key] for key in IDENTITY},
        settings=settings,
        rule="",
        seeds=len(runs),
        scores={},
        minutes=statistics.fmean(seconds) / 60 if seconds else None,
    )
    rows = []
    for rule, name in RULES.items():
        known = [s for run in runs if (s := (run.results["scores"] or {}).get(rule))]
        scores = {m: _score([s[m] for s in known]) for m in METRICS if known}
        if scores:
            rows.append(replace(blank, rule=name, seeds=len(known), scores=scores))
    return rows or [blank]


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


def to_csv(comparison: Comparison) -> str:
    """The table as CSV: scores and spreads as fractions."""
    file = io.StringIO()
    told = [*IDENTITY, "settings", "rule", "seeds"]
    writer = csv.writer(file, lineterminator="\n")
    scores = [name for m in METRICS for name in (m, f"{m}_spread")]
    writer.writerow([*told, *scores, "minutes", "protocol", "source"])
    for row in comparison.rows:
        pairs = [(s.mean, s.spread) if (s := row.scores.get(m)) else (None, None) for m in METRICS]
        values = [value for pair in pairs for value in pair]
        writer.writerow([*(getattr(row, t) for t in told), *values, row.minutes, row.protocol, row.source])
    return file.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """The table as Markdown, scores in percent, best in bold; below it the notes."""
    header, lines = _cells(comparison.rows)
    table = [
        header,
        [":--" if name in TEXTS else "--:" for name in header],
        *([f"**{cell}**" if best else cell.replace("|", "\\|") for cell, best in line] for line in lines),
    ]
    text = "\n".join(f"| {' | '.join(line)} |" for line in table)
    return f"{text}\n\n" + "".join(f"- {note}\n" for note in _notes(comparison))


def to_text(comparison: Comparison) -> str:
    """The table as plain text, scores in percent; below it the notes."""
    file = io.StringIO()
    _print(comparison, Console(file=file, width=FILE_WIDTH))
    return file.getvalue()


def _print(comparison: Comparison, console: Console) -> None:
    header, lines = _cells(comparison.rows)
    table = Table()
    for name in header:
        table.add_column(name, justify="left" if name in TEXTS else "right")
    for number, line in enumerate(lines):
        if number and comparison.rows[number].dataset != comparison.rows[number - 1].dataset:
            table.add_section()
        table.add_row(*(Text(cell, style="bold" if best else "") for cell, best in line))
    console.print(table)
    for note in _notes(comparison):
        console.print(note, markup=False, highlight=False)


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """The header and, per row, each cell's text and whether it is the best; empty columns are left out."""
    sources = _sources(rows)
    lines = []
    for row in rows:
        rule = f"{row.rule}, {row.protocol} [{sources.index(row.source) + 1}]" if row.source else row.rule
        counts = [row.num_clusters, row.epochs, row.seeds]
        k, epochs, seeds = ("" if count is None else str(count) for count in counts)
        line = [(text, False) for text in (row.dataset, row.method, row.backbone, k, epochs, row.settings)]
        line += [(rule or "no scores", False)]
        line += [(_percent(row.scores.get(m)), m in row.best) for m in METRICS]
        line += [(seeds, False), ("" if row.minutes is None else f"{row.minutes:.1f}", False)]
        lines.append(line)
    used = [any(line[column][0] for line in lines) for column in range(len(COLUMNS))]
    return list(compress(COLUMNS, used)), [list(compress(line, used)) for line in lines]


def _percent(score: Score | None) -> str:
    if score is None:
        return ""
    mean = f"{100 * score.mean:.1f}"
    return mean if score.spread is None else f"{mean} ± {100 * score.spread:.1f}"


def _sources(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.source for row in rows if row.source))


def _notes(comparison: Comparison) -> list[str]:
    """What the table means, where its published figures are from, which runs are not in it."""
    return [
        "ACC, NMI, ARI in percent: mean ± sample standard deviation over seeds; bold: best of the runs.",
        *(f"[{number}] {source}" for number, source in enumerate(_sources(comparison.rows), start=1)),
        *(f"not in the table: {name} ({why})" for name, why in comparison.left_out),
    ]


def published_figures() -> list[dict]:
    """The entries of conf/published.yaml."""
    text = resources.files("deepclust.conf").joinpath("published.yaml").read_text(encoding="utf-8")
    figures = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(figures, dict)
    return figures["published"]


def main(cfg: DictConfig) -> None:
    """Print the table that the configuration asks for, or write it to a file."""
    output = None if cfg.output is None else Path(cfg.output)
    form = str(cfg.format if output is None else ENDINGS.get(output.suffix))
    if form not in ENDINGS.values():
        raise InputError(
            f"format={cfg.format}" if output is None else f"output={output} ends in {output.suffix!r}",
            expected="text, markdown or csv" if output is None else " or ".join(ENDINGS),
            do="choose one of these",
        )
    comparison = compare(Path(cfg.runs), published=published_figures(), ignore=list(cfg.ignore))
    if form == "csv":  # has no place for notes
        for name, why in comparison.left_out:
            print(f"not in the table: {name} ({why})", file=sys.stderr)
    if output is None and form == "text":
        _print(comparison, Console(width=None if sys.stdout.isatty() else FILE_WIDTH))
        return
    text = {"text": to_text, "markdown": to_markdown, "csv": to_csv}[form](comparison)
    if output is None:
        print(text, end="")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        print(f"{output}: {len(comparison.rows)} rows, {len(comparison.left_out)} runs not in the table")
