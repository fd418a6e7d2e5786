"""A comparison as text, Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Sequence
from itertools import compress

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepclust.comparison.finished_runs import IDENTITY, METRICS
from deepclust.comparison.table import Comparison, Row, percent, standings

COLUMNS = ["Data set", "Method", "Backbone", "K", "Epochs", "Settings", "Clusters by"]
COLUMNS += [*(metric.upper() for metric in METRICS), "p", "Seeds", "Minutes"]
TEXTS = {"Data set", "Method", "Backbone", "Settings", "Clusters by"}  # the rest are numbers
FILE_WIDTH = 200  # characters; what a terminal would tell otherwise


def to_csv(comparison: Comparison) -> str:
    """The table as CSV: scores and spreads as fractions."""
    file = io.StringIO()
    told = [*IDENTITY, "settings", "rule", "seeds"]
    writer = csv.writer(file, lineterminator="\n")
    scores = [name for m in METRICS for name in (m, f"{m}_spread")]
    writer.writerow([*told, *scores, "p_value", "minutes", "protocol", "source"])
    for row in comparison.rows:
        pairs = [(s.mean, s.spread) if (s := row.scores.get(m)) else (None, None) for m in METRICS]
        values = [value for pair in pairs for value in pair]
        writer.writerow([*(getattr(row, t) for t in told), *values, row.p_value, row.minutes, row.protocol, row.source])
    return file.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """The table as Markdown, scores in percent, best in bold; below it the notes."""
    header, lines = cells(comparison.rows)
    table = [
        header,
        [":--" if name in TEXTS else "--:" for name in header],
        *([f"**{cell}**" if best else cell.replace("|", "\\|") for cell, best in line] for line in lines),
    ]
    text = "\n".join(f"| {' | '.join(line)} |" for line in table)
    return f"{text}\n\n" + "".join(f"- {note}\n" for note in notes(comparison))


def to_text(comparison: Comparison) -> str:
    """The table as plain text, scores in percent; below it the notes."""
    file = io.StringIO()
    show(comparison, Console(file=file, width=FILE_WIDTH))
    return file.getvalue()


def show(comparison: Comparison, console: Console) -> None:
    header, lines = cells(comparison.rows)
    table = Table()
    for name in header:
        table.add_column(name, justify="left" if name in TEXTS else "right")
    mark = "" if console.is_terminal else "*"  # what is not a terminal shows no bold
    for number, line in enumerate(lines):
        if number and comparison.rows[number].dataset != comparison.rows[number - 1].dataset:
            table.add_section()
        table.add_row(*(Text(f"{cell}{mark}", style="bold") if best else Text(cell) for cell, best in line))
    console.print(table)
    for note in notes(comparison, best=mark or "bold"):
        console.print(note, markup=False, highlight=False)


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """The header and, per row, each cell's text and whether it is the best; empty columns are left out."""
    sources = _sources(rows)
    lines = []
    for row in rows:
        rule = f"{row.rule}, {row.protocol} [{sources.index(row.source) + 1}]" if row.source else row.rule
        counts = [row.num_clusters, row.epochs, row.seeds]
        k, epochs, seeds = ("" if count is None else str(count) for count in counts)
        line = [(text, False) for text in (row.dataset, row.method, row.backbone, k, epochs, row.settings)]
        line += [(rule or "no scores", False)]
        line += [(percent(row.scores.get(m)), m in row.best) for m in METRICS]
        line += [("" if row.p_value is None else f"{row.p_value:.2g}", False)]
        line += [(seeds, False), (_minutes(row.minutes), False)]
        lines.append(line)
    used = [any(line[column][0] for line in lines) for column in range(len(COLUMNS))]
    return list(compress(COLUMNS, used)), [list(compress(line, used)) for line in lines]


def _minutes(minutes: float | None) -> str:
    return "" if minutes is None else "< 0.1" if minutes < 0.05 else f"{minutes:.1f}"


def _sources(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.source for row in rows if row.source))


def notes(comparison: Comparison, *, best: str = "bold") -> list[str]:
    """What the table means, how the `best` is marked, where published figures are from, which runs are not in it."""
    tested = any(row.p_value is not None for row in comparison.rows)
    return [
        f"ACC, NMI, ARI in percent: mean ± sample standard deviation over seeds; {best}: best of the runs.",
        *(f"[{number}] {source}" for number, source in enumerate(_sources(comparison.rows), start=1)),
        *(["p: paired t-test on ACC against the data set's best row, over common seeds."] if tested else []),
        *standings(comparison.rows),
        *(f"not in the table: {name} ({why})" for name, why in comparison.left_out),
    ]


def to_latex(comparison: Comparison) -> str:
    """The table for LaTeX with booktabs, scores in percent, best in bold; the notes are comments above it."""
    header, lines = cells(comparison.rows)
    columns = "".join("l" if name in TEXTS else "r" for name in header)
    text = "".join(f"% {note}\n" for note in notes(comparison))
    text += f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{' & '.join(header)} \\\\\n"
    before = None
    for row, line in zip(comparison.rows, lines, strict=True):
        text += "" if row.dataset == before else "\\midrule\n"
        before = row.dataset
        text += " & ".join(f"\\textbf{{{_tex(cell)}}}" if best else _tex(cell) for cell, best in line) + " \\\\\n"
    return text + "\\bottomrule\n\\end{tabular}\n"


def _tex(text: str) -> str:
    signs = {**{c: f"\\{c}" for c in "&%$#_{}"}, "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    signs |= {"\\": "\\textbackslash{}", "±": "$\\pm$"}
    return "".join(signs.get(c, c) for c in text)
