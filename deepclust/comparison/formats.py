"""A comparison as text, Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Sequence
from itertools import compress

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepclust.comparison.finished_runs import IDENTITY_KEYS
from deepclust.comparison.table import Comparison, Row, compare_to_published, format_percent
from deepclust.engine.csv_cells import text_cell
from deepclust.score_names import SCORE_NAMES

COLUMNS = ["Data set", "Method", "Backbone", "K", "Epochs", "Settings", "Clusters by"]
COLUMNS += [*(metric.upper() for metric in SCORE_NAMES), "p", "Seeds", "Minutes"]
TEXT_COLUMNS = {"Data set", "Method", "Backbone", "Settings", "Clusters by"}  # the others hold numbers
FILE_WIDTH = 200  # characters in a line of a text file; on a terminal, its own width holds


def to_csv(comparison: Comparison) -> str:
    """Return the table as CSV, with scores and spreads as fractions."""
    file = io.StringIO()
    fields = [*IDENTITY_KEYS, "settings", "rule", "seeds"]
    writer = csv.writer(file, lineterminator="\n")
    score_columns = [name for m in SCORE_NAMES for name in (m, f"{m}_spread")]
    writer.writerow([*fields, *score_columns, "p_value", "minutes", "protocol", "source"])
    for row in comparison.rows:
        pairs = [(s.mean, s.spread) if (s := row.scores.get(m)) else (None, None) for m in SCORE_NAMES]
        scores = [value for pair in pairs for value in pair]
        identity = [getattr(row, field) for field in fields]
        values = [*identity, *scores, row.p_value, row.minutes, row.protocol, row.source]
        writer.writerow(map(text_cell, values))
    return file.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """Return the table as Markdown, with scores in percent and the best in bold, and the notes below it."""
    header, lines = format_cells(comparison.rows)
    table = [
        header,
        [":--" if name in TEXT_COLUMNS else "--:" for name in header],
        *([f"**{cell}**" if is_best else cell.replace("|", "\\|") for cell, is_best in line] for line in lines),
    ]
    text = "\n".join(f"| {' | '.join(line)} |" for line in table)
    return f"{text}\n\n" + "".join(f"- {note}\n" for note in make_notes(comparison))


def to_text(comparison: Comparison) -> str:
    """Return the table as plain text, with scores in percent, and the notes below it."""
    file = io.StringIO()
    print_comparison(comparison, Console(file=file, width=FILE_WIDTH))
    return file.getvalue()


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the table, with scores in percent, and the notes below it."""
    header, lines = format_cells(comparison.rows)
    mark = "" if console.is_terminal else "*"  # in a file, bold is not seen
    if measure_width(header, lines, mark) > console.width:
        header, lines, shared = leave_out_shared_columns(header, lines)
        if shared:
            console.print(f"all rows: {', '.join(shared)}", markup=False, highlight=False)
    is_narrow = measure_width(header, lines, mark) > console.width
    table = Table(padding=(0, 0) if is_narrow else (0, 1))
    for name in header:
        # Where there is no room for all of it, text is broken between words and numbers stay whole.
        table.add_column(name, justify="left" if name in TEXT_COLUMNS else "right", no_wrap=name not in TEXT_COLUMNS)
    for number, line in enumerate(lines):
        if number and comparison.rows[number].dataset != comparison.rows[number - 1].dataset:
            table.add_section()
        table.add_row(*(Text(f"{cell}{mark}", style="bold") if is_best else Text(cell) for cell, is_best in line))
    console.print(table)
    for note in make_notes(comparison, best=mark or "bold"):
        console.print(note, markup=False, highlight=False)


def measure_width(header: Sequence[str], lines: Sequence[Sequence[tuple[str, bool]]], mark: str) -> int:
    """Return how many characters wide a table of these cells is, with its lines and a space on both sides of a cell."""
    columns = zip(*[[(name, False) for name in header], *lines], strict=True)
    return 1 + sum(3 + max(len(text) + is_best * len(mark) for text, is_best in column) for column in columns)


def leave_out_shared_columns(
    header: list[str], lines: list[list[tuple[str, bool]]]
) -> tuple[list[str], list[list[tuple[str, bool]]], list[str]]:
    """Return the table without the columns that say the same in all rows, and what these say.

    Columns of scores stay, and so does that of the rules, without which a score has no meaning.
    """
    candidates = {"Data set", "Method", "Backbone", "K", "Epochs", "Seeds"}
    texts = [{line[column][0] for line in lines} for column in range(len(header))]
    is_shared = [name in candidates and len(known) == 1 for name, known in zip(header, texts, strict=True)]
    shared = [f"{name} {min(texts[column])}" for column, name in enumerate(header) if is_shared[column]]
    is_left = [not value for value in is_shared]
    return list(compress(header, is_left)), [list(compress(line, is_left)) for line in lines], shared


def format_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Return the header and, for each row, the text of each cell and whether it is the best score.

    Empty columns are left out.
    """
    sources = _list_sources(rows)
    lines = []
    for row in rows:
        rule = f"{row.rule}, {row.protocol} [{sources.index(row.source) + 1}]" if row.source else row.rule
        counts = [row.num_clusters, row.epochs, row.seeds]
        num_clusters, epochs, seeds = ("" if count is None else str(count) for count in counts)
        line = [(text, False) for text in (row.dataset, row.method, row.backbone, num_clusters, epochs, row.settings)]
        line += [(rule or "no scores", False)]
        line += [(format_percent(row.scores.get(m)), m in row.best) for m in SCORE_NAMES]
        line += [("" if row.p_value is None else f"{row.p_value:.2g}", False)]
        line += [(seeds, False), (_format_minutes(row.minutes), False)]
        lines.append(line)
    is_used = [any(line[column][0] for line in lines) for column in range(len(COLUMNS))]
    return list(compress(COLUMNS, is_used)), [list(compress(line, is_used)) for line in lines]


def _format_minutes(minutes: float | None) -> str:
    return "" if minutes is None else "< 0.1" if minutes < 0.05 else f"{minutes:.1f}"


def _list_sources(rows: Sequence[Row]) -> list[str]:
    """Return the sources of published figures, each once."""
    return list(dict.fromkeys(row.source for row in rows if row.source))


def make_notes(comparison: Comparison, *, best: str = "bold") -> list[str]:
    """Return the notes below the table: its meaning, the sources of published figures, the runs that are not in it.

    best: how the best scores are marked.
    """
    has_p_values = any(row.p_value is not None for row in comparison.rows)
    return [
        f"ACC, NMI, ARI in percent: mean ± sample standard deviation over seeds; {best}: best of the runs.",
        *(f"[{number}] {source}" for number, source in enumerate(_list_sources(comparison.rows), start=1)),
        *(["p: paired t-test on ACC against the data set's best row, over common seeds."] if has_p_values else []),
        *compare_to_published(comparison.rows),
        *(f"not in the table: {name} ({reason})" for name, reason in comparison.left_out),
    ]


def to_latex(comparison: Comparison) -> str:
    """Return the table for LaTeX with booktabs, with scores in percent and the best in bold.

    The notes are comments above it.
    """
    header, lines = format_cells(comparison.rows)
    alignment = "".join("l" if name in TEXT_COLUMNS else "r" for name in header)
    text = "".join(f"% {note}\n" for note in make_notes(comparison))
    text += f"\\begin{{tabular}}{{{alignment}}}\n\\toprule\n{' & '.join(header)} \\\\\n"
    previous_dataset = None
    for row, line in zip(comparison.rows, lines, strict=True):
        text += "" if row.dataset == previous_dataset else "\\midrule\n"
        previous_dataset = row.dataset
        cells = (f"\\textbf{{{_escape_latex(cell)}}}" if is_best else _escape_latex(cell) for cell, is_best in line)
        text += " & ".join(cells) + " \\\\\n"
    return text + "\\bottomrule\n\\end{tabular}\n"


def _escape_latex(text: str) -> str:
    replacements = {**{c: f"\\{c}" for c in "&%$#_{}"}, "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    replacements |= {"\\": "\\textbackslash{}", "±": "$\\pm$"}
    return "".join(replacements.get(c, c) for c in text)
