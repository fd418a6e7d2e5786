"""A comparison as one HTML page that needs no network: bars, the table and links to the reports of the runs."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from deepclust.comparison.formats import TEXT_COLUMNS, format_cells, make_notes
from deepclust.comparison.table import Comparison, Row, format_percent
from deepclust.engine.plurals import format_count

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .5rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap }
th.text, td.text { text-align: left }
td.best { font-weight: 700 }
.published { color: #777 }
.bars { display: grid; grid-template-columns: fit-content(22rem) 1fr 7rem; gap: .3rem .8rem; font-size: .85rem }
.bars > * { align-self: center; line-height: 1.2 }
.name { text-align: right; overflow-wrap: anywhere }
.track { position: relative; height: 1.3rem; print-color-adjust: exact; -webkit-print-color-adjust: exact;
 background: repeating-linear-gradient(90deg, #8886 0 1px, #0000 1px 20%); border-right: 1px solid #8886 }
.track i, .track b { position: absolute; left: 0; top: .1rem; bottom: .1rem; background: #999 }
.track .method { background: #2a7f9e }
.track .kmeans { background: #d18f2c }
.track b { top: .6rem; bottom: .55rem; background: currentColor }
.ticks { display: flex; justify-content: space-between; margin: 0 -.5rem; color: #777 }
h2 { margin-top: 2.5rem; break-after: avoid }
li { overflow-wrap: anywhere }
@media (max-width: 600px) {
 .bars { grid-template-columns: 1fr 5.5rem }
 .name { grid-column: 1 / 3; text-align: left; margin-top: .3rem }
 .none { display: none }
 tr:first-child, td:empty { display: none }
 tr { display: flex; flex-wrap: wrap; gap: 0 .8rem; padding: .4rem 0; border-bottom: 1px solid #8884 }
 td { border: 0; padding: 0; white-space: normal; text-align: left }
 td:not(.text)::before { content: attr(data-name) " "; color: #777; font-weight: 400 }
}
@page { size: A4 landscape; margin: 1.2cm }
@media print {
 body { margin: 0; max-width: none; padding: 0; font-size: 11px }
 .wide { overflow: visible }
 th, td { padding: .2rem .4rem }
 td.text { white-space: normal }
 tr, .track { break-inside: avoid }
}
"""


def to_html(comparison: Comparison, runs: Path, *, page_folder: Path) -> str:
    """Return the page.

    runs: the folder that was searched for runs; the page links to the reports below it.
    page_folder: the folder in which the page will be; the links are relative to it.
    """
    datasets = list(dict.fromkeys(row.dataset for row in comparison.rows))
    title = f"{format_count(len(comparison.rows), 'row')}, {format_count(len(datasets), 'data set')}"
    parts = [f"<h1>{title}</h1>"]
    for dataset in datasets:
        rows = [row for row in comparison.rows if row.dataset == dataset and "acc" in row.scores]
        parts += [f"<h2>{escape(dataset)}: ACC</h2>", _render_bars(rows)] if rows else []
    parts += ["<h2>All scores</h2>", _render_table(comparison, runs, page_folder)]
    parts += ["<h2>Notes</h2><ul>", *(f"<li>{escape(note)}</li>" for note in make_notes(comparison)), "</ul>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f"<!doctype html><html lang=en>{head}<title>deepclust compare</title><style>{STYLE}</style>{''.join(parts)}\n"
    )


def _render_bars(rows: Sequence[Row]) -> str:
    """Return mean ACC as bars from 0 to 100 %, with the spread over seeds as a whisker."""
    lines = []
    for row in rows:
        score = row.scores["acc"]
        name = " ".join(part for part in (row.method, f"by {row.rule}", row.settings) if part)
        bar = f'<i class="{row.rule}" style="width:{100 * score.mean:.2f}%"></i>'
        if score.spread:
            low, high = (min(1.0, max(0.0, score.mean + sign * score.spread)) for sign in (-1, 1))
            bar += f'<b style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></b>'
        lines.append(f'<span class="name">{escape(name)}</span><span class="track">{bar}</span>')
        lines.append(f"<span>{format_percent(score)}</span>")
    ticks = "".join(f"<span>{tick}</span>" for tick in range(0, 101, 20))
    return f'<div class="bars">{"".join(lines)}<span class="none"></span><span class="ticks">{ticks}</span></div>'


def _render_table(comparison: Comparison, runs: Path, page_folder: Path) -> str:
    header, lines = format_cells(comparison.rows)
    classes = [' class="text"' if name in TEXT_COLUMNS else "" for name in header]
    head = "".join(f"<th{css_class}>{escape(name)}</th>" for name, css_class in zip(header, classes, strict=True))
    body = []
    for row, line in zip(comparison.rows, lines, strict=True):
        cells = "".join(
            f'<td{" class=best" if is_best else css_class} data-name="{escape(name)}">{escape(cell)}</td>'
            for (cell, is_best), css_class, name in zip(line, classes, header, strict=True)
        )
        links = " ".join(
            f'<a href="{escape(os.path.relpath(report, page_folder))}">{number}</a>'
            for number, folder in enumerate(row.folders, start=1)
            if (report := runs / folder / "report.html").is_file()
        )
        row_class = ' class="published"' if row.rule == "published" else ""
        body.append(f'<tr{row_class}>{cells}<td data-name="Reports">{links}</td></tr>')
    return f'<div class="wide"><table><tr>{head}<th>Reports</th></tr>{"".join(body)}</table></div>'
