"""What was logged over time, as small plots."""

import csv
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from deepclust.report.html_fragments import line, number, words

POINTS = 300  # of a curve; more are averaged
DECADES = 3  # a curve of positive values that spans more has a logarithmic axis
SCORES = ("acc", "nmi", "ari")
HEALTH = "eval/cluster_size_entropy"

NOTES = (
    "scores and cluster sizes end in what the finished run is judged by",
    "cluster size entropy: 1 where all clusters are of one size, 0 where one holds all",
    "train: terms of the loss and what else the method tells, means of the steps; its file says what they are",
)

Line = tuple[np.ndarray, np.ndarray]  # x and y


def curves(file: Path | None, *, rules: Mapping[str, str], final: Mapping[str, float], steps: int, epochs: int) -> str:
    """One small plot a scalar of the CSV `file`: scores by rule, cluster sizes, losses, then the rest as it comes.

    A curve that has a `final` value ends in it.
    """
    if file is None or not file.is_file():
        return ""
    lines = _read(file)
    unit, scale = ("epoch", epochs / steps) if steps and epochs else ("step", 1.0)
    for name in lines.keys() & final.keys():
        lines[name] = np.append(lines[name][0], steps), np.append(lines[name][1], final[name])
    lines = {name: (x * scale, y) for name, (x, y) in lines.items()}
    plots = []
    for rule, title in rules.items():
        scores = {m.upper(): lines.pop(name) for m in SCORES if (name := f"eval/{rule}/{m}") in lines}
        if scores:
            percent = {name: (x, 100 * y) for name, (x, y) in scores.items()}
            plots.append(_plot(f"{title}, percent", percent, unit))
    rest = sorted(lines, key=lambda name: (name != HEALTH, not name.endswith("/loss")))
    plots += [_plot(words(name), {"": lines[name]}, unit) for name in rest]
    return f'{line(NOTES)}<div class="plots">{"".join(plots)}</div>' if plots else ""


def number_of_clusters(told: Mapping | None) -> str:
    """How the number of clusters was told: what was said, and one small plot a measure; empty without."""
    if told is None:
        return ""
    titles = {
        "silhouette": "silhouette: lead over one cloud",
        "stability": "stability: share of what one cloud leaves open",
        "eigengap": "eigengap of the neighbour graph",
    }
    plots = []
    for name, title in titles.items():
        x, y = np.array(told["curves"][name], dtype=float).T
        plots.append(_plot(f"{title}; names {told['named'][name]}", {"at last": (x, y)}, "clusters"))
    return f'{line([told["message"]])}<div class="plots">{"".join(plots)}</div>'


def _read(file: Path) -> dict[str, Line]:
    """Steps and values of every scalar that was logged as a finite number, at most POINTS each."""
    found: dict[str, list[tuple[float, float]]] = {}
    with file.open(newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            for name, text in row.items():
                if name not in ("step", "epoch") and text and math.isfinite(value := float(text)):
                    found.setdefault(name, []).append((float(row["step"]), value))
    averaged = {}
    for name, points in found.items():
        bins = np.array_split(np.array(points), min(len(points), POINTS))
        x, y = np.array([b.mean(0) for b in bins]).T
        averaged[name] = x, y
    return averaged


def _plot(title: str, lines: Mapping[str, Line], unit: str) -> str:
    left, top, right, bottom = 46, 8, 312, 140
    logarithmic = _wide([y for _, y in lines.values()])
    heights = {name: np.log10(y) if logarithmic else y for name, (_, y) in lines.items()}
    x_low, x_high, _ = _axis([x for x, _ in lines.values()], tight=True)
    y_low, y_high, y_ticks = _axis(list(heights.values()))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * (x - x_low) / (x_high - x_low),
            bottom - (bottom - top) * (y - y_low) / (y_high - y_low),
        )

    drawn = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        drawn.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        said = f"{10**tick:.2g}" if logarithmic else f"{tick:.4g}"
        drawn.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{said}</text>')
    digits = ".0f" if x_high - x_low > 10 else ".3g"
    ends = (left, f"{x_low:{digits}}", "start"), (right, f"{x_high:{digits}}", "end")
    for at, text, anchor in (*ends, ((left + right) // 2, unit, "middle")):
        drawn.append(f'<text x="{at}" y="158" text-anchor="{anchor}">{text}</text>')
    for index, (name, (xs, _)) in enumerate(lines.items()):
        points = [place(x, y) for x, y in zip(xs.tolist(), heights[name].tolist(), strict=True)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        drawn.append(f'<path class="line c{index}" d="M{path}"/>')
        x, y = points[-1]
        drawn.append(f'<circle class="c{index}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    last = "".join(
        f'<span><i class="c{n}"></i>{name} {number(float(y[-1]))}</span>'
        for n, (name, (_, y)) in enumerate(lines.items())
    )
    svg = f'<svg viewBox="0 0 320 164" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{escape(title)}<br>{last}</figcaption>{svg}</figure>"


def _wide(values: Sequence[np.ndarray]) -> bool:
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    return low > 0 and math.log10(high) - math.log10(low) > DECADES


def _axis(values: Sequence[np.ndarray], *, tight: bool = False) -> tuple[float, float, list[float]]:
    """Limits that hold all values, and round numbers between them."""
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # too little for ticks in double precision
        # nothing below a 0 that stays: most that does, such as a count, cannot be negative
        low, high = (low, high + 1) if tight or not low else (low - 0.5 * abs(low), high + 0.5 * abs(high))
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10, 20) if power * m >= rough)
    if not tight:
        low, high = step * math.floor(low / step), step * math.ceil(high / step)
    ticks = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return low, high, ticks
