"""Small plots of what a run has logged over time, and of how its number of clusters was estimated."""

import csv
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from deepclust.report.html_fragments import format_number, key_to_words, render_note
from deepclust.score_names import SCORE_NAMES

MAX_POINTS = 300  # of a curve; neighbouring points of a longer one are averaged
MAX_LINEAR_DECADES = 3  # a curve of positive values that spans more decades gets a logarithmic axis
SMALLEST_DRAWN, LARGEST_DRAWN = 1e-300, 1e300  # beyond, an axis would leave the range of floats
OF_THE_MACHINE = ("speed/", "memory/")  # values that a report does not show: they are for dashboards
CLUSTER_SIZE_ENTROPY = "eval/cluster_size_entropy"

NOTES = (
    "scores and cluster sizes end with the final evaluation",
    "cluster size entropy: 1 if all clusters have the same size, 0 if one cluster has all images",
    "train: terms of the loss and other values of the method, averaged over steps; its module explains them",
)

Curve = tuple[np.ndarray, np.ndarray]  # x and y


def render_curves(
    metrics_file: Path | None,
    *,
    rule_titles: Mapping[str, str],
    final_values: Mapping[str, float],
    steps: int,
    epochs: int,
) -> str:
    """Return the HTML of small plots of the scalars in a CSV file: scores by rule, cluster sizes, losses, all others.

    metrics_file: has a column `step` and one for each scalar, with empty cells where it was not logged.
    rule_titles: `method` and the like -> the title of the plot of `eval/method/acc`, `eval/method/nmi` and so on.
    final_values: by the name of the scalar; its curve ends in this value.
    """
    if metrics_file is None or not metrics_file.is_file():
        return ""
    curves = {n: curve for n, curve in _read_scalars(metrics_file).items() if not n.startswith(OF_THE_MACHINE)}
    unit, scale = ("epoch", epochs / steps) if steps and epochs else ("step", 1.0)
    for name in curves.keys() & final_values.keys():
        curves[name] = np.append(curves[name][0], steps), np.append(curves[name][1], final_values[name])
    curves = {name: (x * scale, y) for name, (x, y) in curves.items()}
    plots = []
    for rule, title in rule_titles.items():
        scores = {m.upper(): curves.pop(name) for m in SCORE_NAMES if (name := f"eval/{rule}/{m}") in curves}
        if scores:
            percent = {name: (x, 100 * y) for name, (x, y) in scores.items()}
            plots.append(_render_plot(f"{title}, percent", percent, unit))
    others = sorted(curves, key=lambda name: (name != CLUSTER_SIZE_ENTROPY, not name.endswith("/loss")))
    plots += [_render_plot(key_to_words(name), {"": curves[name]}, unit) for name in others]
    return f'{render_note(NOTES)}<div class="plots">{"".join(plots)}</div>' if plots else ""


def render_number_of_clusters(estimate: Mapping | None) -> str:
    """Return the HTML of an estimated number of clusters: its message and a small plot of each measure.

    estimate: the entry `number` of results.json; without one, the HTML is empty.
    """
    if estimate is None:
        return ""
    titles = {
        "communities": "modularity of the neighbour graph at several resolutions",
        "separation": "Davies-Bouldin index of k-means, low is good",
    }
    plots = []
    for measure, curve in estimate["curves"].items():
        x, y = np.array(curve, dtype=float).T
        title = f"{titles.get(measure, measure)}; suggests {estimate['named'][measure]}"
        plots.append(_render_plot(title, {"last value": (x, y)}, "clusters"))
    return f'{render_note([estimate["message"]])}<div class="plots">{"".join(plots)}</div>'


def _read_scalars(metrics_file: Path) -> dict[str, Curve]:
    """Return steps and values of every scalar that was logged as a number that can be drawn, MAX_POINTS at most."""
    logged: dict[str, list[tuple[float, float]]] = {}
    with metrics_file.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name not in ("step", "epoch") and text and abs(value := float(text)) < LARGEST_DRAWN:
                    drawn = value if abs(value) > SMALLEST_DRAWN else 0.0
                    logged.setdefault(name, []).append((float(row["step"]), drawn))
    averaged = {}
    for name, points in logged.items():
        bins = np.array_split(np.array(points), min(len(points), MAX_POINTS))
        x, y = np.array([b.mean(0) for b in bins]).T
        averaged[name] = x, y
    return averaged


def _render_plot(title: str, curves: Mapping[str, Curve], x_unit: str) -> str:
    left, top, right, bottom = 46, 8, 312, 140
    is_logarithmic = _needs_logarithmic_axis([y for _, y in curves.values()])
    heights = {name: np.log10(y) if is_logarithmic else y for name, (_, y) in curves.items()}
    x_low, x_high, _ = _compute_axis([x for x, _ in curves.values()], round_limits=False)
    y_low, y_high, y_ticks = _compute_axis(list(heights.values()))

    def to_drawing(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * (x - x_low) / (x_high - x_low),
            bottom - (bottom - top) * (y - y_low) / (y_high - y_low),
        )

    elements = []
    for tick in y_ticks:
        _, y = to_drawing(x_low, tick)
        elements.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        label = f"{10**tick:.2g}" if is_logarithmic else f"{tick:.4g}"
        elements.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    x_format = ".0f" if x_high - x_low > 10 else ".3g"
    x_labels = (
        (left, f"{x_low:{x_format}}", "start"),
        (right, f"{x_high:{x_format}}", "end"),
        ((left + right) // 2, x_unit, "middle"),
    )
    for position, label, anchor in x_labels:
        elements.append(f'<text x="{position}" y="158" text-anchor="{anchor}">{label}</text>')
    for index, (name, (xs, _)) in enumerate(curves.items()):
        points = [to_drawing(x, y) for x, y in zip(xs.tolist(), heights[name].tolist(), strict=True)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        elements.append(f'<path class="line c{index}" d="M{path}"/>')
        x, y = points[-1]
        elements.append(f'<circle class="c{index}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    last_values = "".join(
        f'<span><i class="c{index}"></i>{name} {format_number(float(y[-1]))}</span>'
        for index, (name, (_, y)) in enumerate(curves.items())
    )
    svg = f'<svg viewBox="0 0 320 164" role="img" aria-label="{escape(title)}">{"".join(elements)}</svg>'
    return f"<figure><figcaption>{escape(title)}<br>{last_values}</figcaption>{svg}</figure>"


def _needs_logarithmic_axis(values: Sequence[np.ndarray]) -> bool:
    """Return whether all values are positive and span more than MAX_LINEAR_DECADES."""
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    return low > 0 and math.log10(high) - math.log10(low) > MAX_LINEAR_DECADES


def _compute_axis(values: Sequence[np.ndarray], *, round_limits: bool = True) -> tuple[float, float, list[float]]:
    """Return the lower and the upper limit of an axis that holds all values, and round numbers between them as ticks.

    The limits are the extremes of the values or, with `round_limits`, the round numbers around them.
    """
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # too little for ticks in double precision
        # A value that stays at 0 gets no room below: most such values, counts for example, cannot be negative.
        if not round_limits or not low:
            high = high + 1
        else:
            low, high = low - 0.5 * abs(low), high + 0.5 * abs(high)
    min_step = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(min_step))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= min_step)
    if round_limits:
        low, high = step * math.floor(low / step), step * math.ceil(high / step)
    ticks = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return low, high, ticks
