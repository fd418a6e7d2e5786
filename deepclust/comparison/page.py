"""A comparison as one HTML page: bars, the table, links to the reports of the runs. It needs no network."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from deepclust.comparison.formats import TEXTS, cells, notes
from deepclust.comparison.table import Comparison, Row, percent

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap }
th.text, td.text { text-align: left }
td.best { font-weight: 700 }
.published { color: #777 }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif }
svg text { fill: currentColor }
h2 { margin-top: 2.5rem }
li { overflow-wrap: anywhere }
"""
BAR, LABEL, WIDTH = 20, 260, 900  # pixels: height of a bar, room for its name, width of the chart


def to_html(comparison: Comparison, runs: Path, *, beside: Path) -> str:
    """The page; `beside` is the folder that it will lie in, from which it links to the folders below `runs`."""
    datasets = list(dict.fromkeys(row.dataset for row in comparison.rows))
    parts = [f"<h1>{len(comparison.rows)} rows, {len(datasets)} data sets</h1>"]
    for dataset in datasets:
        rows = [row for row in comparison.rows if row.dataset == dataset and "acc" in row.scores]
        parts += [f"<h2>{escape(dataset)}: ACC</h2>", _bars(rows)] if rows else []
    parts += ["<h2>All scores</h2>", _table(comparison, runs, beside)]
    parts += ["<h2>Notes</h2><ul>", *(f"<li>{escape(note)}</li>" for note in notes(comparison)), "</ul>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f"<!doctype html><html lang=en>{head}<title>deepclust compare</title><style>{STYLE}</style>{''.join(parts)}\n"
    )


def _bars(rows: Sequence[Row]) -> str:
    """Mean ACC as bars, the spread over seeds as a whisker."""
    lines = []
    room = WIDTH - LABEL - 130
    for number, row in enumerate(rows):
        top, score = number * (BAR + 6), row.scores["acc"]
        width, middle = score.mean * room, top + BAR / 2
        name = " ".join(part for part in (row.method, f"by {row.rule}", row.settings) if part)
        lines.append(f'<text x="{LABEL - 8}" y="{middle + 4}" text-anchor="end">{escape(name[:40])}</text>')
        fill = "#999" if row.rule in ("published", "pixels") else "#2a7f9e" if row.rule == "method" else "#d18f2c"
        lines.append(f'<rect x="{LABEL}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{fill}"></rect>')
        if score.spread:
            low, high = (LABEL + max(0.0, score.mean + sign * score.spread) * room for sign in (-1, 1))
            lines.append(f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="currentColor" stroke-width="2"></path>')
        after = LABEL + (score.mean + (score.spread or 0)) * room + 8
        lines.append(f'<text x="{after:.1f}" y="{middle + 4}">{percent(score)}</text>')
    height = len(rows) * (BAR + 6)
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">{"".join(lines)}</svg>'


def _table(comparison: Comparison, runs: Path, beside: Path) -> str:
    header, lines = cells(comparison.rows)
    texts = [' class="text"' if name in TEXTS else "" for name in header]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(header, texts, strict=True))
    body = []
    for row, line in zip(comparison.rows, lines, strict=True):
        cols = "".join(
            f'<td class="best">{escape(cell)}</td>' if best else f"<td{kind}>{escape(cell)}</td>"
            for (cell, best), kind in zip(line, texts, strict=True)
        )
        links = " ".join(
            f'<a href="{escape(os.path.relpath(report, beside))}">{number}</a>'
            for number, folder in enumerate(row.folders, start=1)
            if (report := runs / folder / "report.html").is_file()
        )
        kind = ' class="published"' if row.rule == "published" else ""
        body.append(f"<tr{kind}>{cols}<td>{links}</td></tr>")
    return f'<div class="wide"><table><tr>{head}<th>Reports</th></tr>{"".join(body)}</table></div>'
