"""A comparison as one HTML page: bars, the table, links to the reports of the runs. It needs no network."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from deepclust.comparison.formats import TEXTS, cells, notes
from deepclust.comparison.table import Comparison, Row, percent

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


def to_html(comparison: Comparison, runs: Path, *, beside: Path) -> str:
    """The page; `beside` is the folder that it will lie in, from which it links to the folders below `runs`."""
    datasets = list(dict.fromkeys(row.dataset for row in comparison.rows))
    title = f"{counted(len(comparison.rows), 'row')}, {counted(len(datasets), 'data set')}"
    parts = [f"<h1>{title}</h1>"]
    for dataset in datasets:
        rows = [row for row in comparison.rows if row.dataset == dataset and "acc" in row.scores]
        parts += [f"<h2>{escape(dataset)}: ACC</h2>", _bars(rows)] if rows else []
    parts += ["<h2>All scores</h2>", _table(comparison, runs, beside)]
    parts += ["<h2>Notes</h2><ul>", *(f"<li>{escape(note)}</li>" for note in notes(comparison)), "</ul>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f"<!doctype html><html lang=en>{head}<title>deepclust compare</title><style>{STYLE}</style>{''.join(parts)}\n"
    )


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _bars(rows: Sequence[Row]) -> str:
    """Mean ACC as bars from 0 to 100 %, the spread over seeds as a whisker."""
    lines = []
    for row in rows:
        score = row.scores["acc"]
        name = " ".join(part for part in (row.method, f"by {row.rule}", row.settings) if part)
        bar = f'<i class="{row.rule}" style="width:{100 * score.mean:.2f}%"></i>'
        if score.spread:
            low, high = (min(1.0, max(0.0, score.mean + sign * score.spread)) for sign in (-1, 1))
            bar += f'<b style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></b>'
        lines.append(f'<span class="name">{escape(name)}</span><span class="track">{bar}</span>')
        lines.append(f"<span>{percent(score)}</span>")
    ticks = "".join(f"<span>{tick}</span>" for tick in range(0, 101, 20))
    return f'<div class="bars">{"".join(lines)}<span class="none"></span><span class="ticks">{ticks}</span></div>'


def _table(comparison: Comparison, runs: Path, beside: Path) -> str:
    header, lines = cells(comparison.rows)
    texts = [' class="text"' if name in TEXTS else "" for name in header]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(header, texts, strict=True))
    body = []
    for row, line in zip(comparison.rows, lines, strict=True):
        cols = "".join(
            f'<td{" class=best" if best else kind} data-name="{escape(name)}">{escape(cell)}</td>'
            for (cell, best), kind, name in zip(line, texts, header, strict=True)
        )
        links = " ".join(
            f'<a href="{escape(os.path.relpath(report, beside))}">{number}</a>'
            for number, folder in enumerate(row.folders, start=1)
            if (report := runs / folder / "report.html").is_file()
        )
        kind = ' class="published"' if row.rule == "published" else ""
        body.append(f'<tr{kind}>{cols}<td data-name="Reports">{links}</td></tr>')
    return f'<div class="wide"><table><tr>{head}<th>Reports</th></tr>{"".join(body)}</table></div>'
