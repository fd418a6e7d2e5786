"""report.html: one file that opens without a network: scores, clusters as pictures, plots, how it was run."""

import base64
import csv
import io
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from deepclust.datasets.source import ImageSource
from deepclust.randomness import generator

PICTURE_BYTES = 7_000_000  # of all pictures as text; leaves room for the rest of a page of less than 10 MB
SIDES = (96, 80, 64, 48, 32)  # pixels; the largest that fits is taken
PIXELATED_BELOW = 48  # pixels; smaller pictures are enlarged with sharp edges
HEAT = (37, 99, 235)  # colour of the contingency table
CELLS = 40 * 40  # a larger contingency table is drawn as one picture, without its numbers
POINTS = 300  # of a curve; more are averaged
METRICS = {
    "acc": "images whose cluster is matched to their class, one cluster a class",
    "nmi": "what cluster and class tell of each other; 100 is the same grouping",
    "ari": "pairs of images rightly together or apart; 0 is chance",
}
RULES = {
    "method": "the method's own rule",
    "kmeans": "k-means on its features",
    "kmeans_on_pixels": "k-means on the pixels",
}
STRIPS = ("most typical", "random", "least certain")


class Picture(NamedTuple):
    """Pixels, uint8 (H, W, channels), and the text shown when pointed at."""

    pixels: np.ndarray
    caption: str


class Sheet(TypedDict):
    """What the report shows of a cluster. An image appears in one of the three lists only."""

    cluster: int
    size: int
    share: float  # of all images
    typical: list[Picture]  # highest confidence first
    random: list[Picture]
    uncertain: list[Picture]  # lowest confidence first
    majority: str | None  # the most frequent class; None without labels
    purity: float | None  # its share among the labelled images of the cluster


def cluster_sheets(
    source: ImageSource,
    assignments: np.ndarray,
    confidence: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
    per_cluster: int,
    seed: int,
) -> list[Sheet]:
    """Sheets of the clusters that have images, largest first, with up to `per_cluster` images a list.

    assignments (M,) and confidence (M,) are about the images of `source`, as are labels (M,), -1 where
    unknown, and paths. To fit the page, images get smaller, then fewer, then small clusters are left out.
    """
    sizes = np.bincount(assignments)
    clusters = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    side, count, most = _limits(source.shape, num_clusters=len(clusters), per_cluster=per_cluster)
    sheets = []
    for cluster in clusters[:most].tolist():
        members = np.flatnonzero(assignments == cluster)
        chosen = _choose(members, confidence[members], count=count, key=(seed, "report", cluster))
        images = source.read(np.concatenate(chosen)).permute(0, 2, 3, 1).numpy()
        pictures = [
            Picture(_shrink(pixels, side), _caption(index, confidence[index], paths))
            for pixels, index in zip(images, np.concatenate(chosen).tolist(), strict=True)
        ]
        cuts = np.cumsum([len(c) for c in chosen])
        majority, purity = _majority(members, labels, class_names)
        sheets.append(
            Sheet(
                cluster=cluster,
                size=len(members),
                share=len(members) / len(assignments),
                typical=pictures[: cuts[0]],
                random=pictures[cuts[0] : cuts[1]],
                uncertain=pictures[cuts[1] :],
                majority=majority,
                purity=purity,
            )
        )
    return sheets


def _limits(shape: tuple[int, int, int], *, num_clusters: int, per_cluster: int) -> tuple[int, int, int]:
    """The longer side of a picture in pixels, pictures a list, clusters, so that all fit PICTURE_BYTES."""

    def fitting(side: int) -> int:
        scale = min(1.0, side / max(shape[:2]))
        pixels = math.ceil(shape[0] * scale) * math.ceil(shape[1] * scale) * shape[2]
        # 4 characters for 3 bytes; 500 for PNG's head and the caption
        return PICTURE_BYTES // (pixels * 4 // 3 + 500)

    wanted = len(STRIPS) * num_clusters
    side = next((s for s in SIDES if fitting(s) >= wanted * per_cluster), SIDES[-1])
    count = min(per_cluster, max(1, fitting(side) // wanted))
    return side, count, fitting(side) // (len(STRIPS) * count)


def _choose(
    members: np.ndarray, confidence: np.ndarray, *, count: int, key: tuple[int | str, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to `count` of the members each: most confident, random among the others, least confident."""
    order = members[np.argsort(-confidence, kind="stable")]
    typical, rest = order[:count], order[count:]
    uncertain = rest[::-1][:count]
    between = rest[: len(rest) - len(uncertain)]
    drawn = torch.randperm(len(between), generator=generator(*key))[:count]
    return typical, between[drawn.numpy()], uncertain


def _shrink(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width, channels = pixels.shape
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = _picture(pixels).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(small).reshape(size[1], size[0], channels)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def _caption(index: int, confidence: float, paths: Sequence[str] | None) -> str:
    return f"{f'image {index}' if paths is None else paths[index]}, confidence {confidence:.2f}"


def _majority(
    members: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str] | None
) -> tuple[str | None, float | None]:
    known = np.empty(0, np.int64) if labels is None else labels[members][labels[members] >= 0]
    if not len(known):
        return None, None
    counts = np.bincount(known)
    top = int(counts.argmax())
    return _class_name(top, class_names), float(counts[top] / len(known))


def _class_name(index: int, class_names: Sequence[str] | None) -> str:
    return f"class {index}" if class_names is None else class_names[index]


def write_report(
    path: Path,
    *,
    results: Mapping,
    sheets: Sequence[Sheet],
    table: np.ndarray | None,
    class_names: Sequence[str] | None,
    curves: Path | None,
    config_text: str,
) -> None:
    """Write the page to `path`.

    results: the content of results.json. table: counts (C, K) of classes in clusters. curves: a CSV file with
    a column `step` and one a scalar, empty where nothing was logged. What is None or missing is left out.
    """
    parts = {
        "Clusters": _clusters(sheets, results),
        "Classes": "" if table is None else _heat_map(table, class_names),
        "Curves": "" if curves is None or not curves.is_file() else _curves(curves, results),
        "Run": _run(results, config_text),
    }
    shown = {name: body for name, body in parts.items() if body}
    title = escape(f"{results['method']} on {results['dataset']}")
    links = " ".join(f'<a href="#{name}">{name}</a>' for name in shown)
    body = "".join(f'<section id="{name}"><h2>{name}</h2>{text}</section>' for name, text in shown.items())
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # the browser itself keeps the page from loading anything
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{title}</h1>{_head(results)}<nav>{links}</nav></header>{body}</body></html>\n",
        encoding="utf-8",
        errors="replace",  # a file's name may be no valid text
    )


def _head(results: Mapping) -> str:
    """What was clustered, and the scores with what they mean; without labels, what can still be said."""
    images, clusters, epochs = (f"{results[key]:,}" for key in ("num_images", "num_clusters", "epochs"))
    facts = [f"{images} images", f"{clusters} clusters", results["backbone"], f"{epochs} epochs"]
    facts.append(f"seed {results['seed']}")
    health = results["health"]
    scored = {**(results["scores"] or {}), **(results.get("baseline") or {})}
    known = [(name, s) for rule, name in RULES.items() if (s := scored.get(rule))]
    if known:
        (rule, scores), *others = known
        tiles = [(m.upper(), 100 * scores[m], meaning) for m, meaning in METRICS.items()]
        below = [[f"in percent, for {rule}"]]
        below += [[name, *(f"{m.upper()} {100 * s[m]:.1f}" for m in METRICS)] for name, s in others]
    else:
        evenness = 100 * health["cluster_size_entropy"]
        tiles = [("evenness", evenness, "of the cluster sizes; 100 is all of one size")]
        below = [["in percent; without labels nothing can be said about right or wrong"]]
    below.append([f"{_words(key)} {_number(value)}" for key, value in health.items()])
    cards = "".join(f"<div><b>{v:.1f}</b> {name}<p>{meaning}</p></div>" for name, v, meaning in tiles)
    return f'{_line(facts)}<div class="tiles">{cards}</div>{"".join(map(_line, below))}'


def _line(parts: Iterable[str]) -> str:
    return f'<p class="dim">{escape(" · ".join(parts))}</p>'


def _clusters(sheets: Sequence[Sheet], results: Mapping) -> str:
    if not sheets:
        return ""
    most = max(len(sheet["typical"]) for sheet in sheets)
    wide, narrow = (math.ceil(most / math.ceil(most / across)) for across in (8, 6))  # columns, in full rows
    left = int(results["num_clusters"] - results["health"]["empty_clusters"]) - len(sheets)
    note = _line([f"the largest {len(sheets):,}; {left:,} smaller ones are not shown"]) if left > 0 else ""
    largest = max(sheet["size"] for sheet in sheets)
    cards = "".join(_card(sheet, largest=largest) for sheet in sheets)
    return f'{note}<div class="cards" style="--wide:{wide};--narrow:{narrow}">{cards}</div>'


def _card(sheet: Sheet, *, largest: int) -> str:
    name = f"Cluster {sheet['cluster']}"
    if sheet["majority"] is not None and sheet["purity"] is not None:
        name += f" <span>{escape(sheet['majority'])} {100 * sheet['purity']:.0f} %</span>"
    size = _line([f"{sheet['size']:,} images, {100 * sheet['share']:.1f} %"])
    bar = f'<div class="bar"><i style="width:{100 * sheet["size"] / largest:.1f}%"></i></div>'
    lists = zip(STRIPS, (sheet["typical"], sheet["random"], sheet["uncertain"]), strict=True)
    strips = "".join(
        f'<h4>{title}</h4><div class="strip">{"".join(map(_image, pictures))}</div>'
        for title, pictures in lists
        if pictures
    )
    return f"<article><h3>{name}</h3>{size}{bar}{strips}</article>"


def _image(picture: Picture) -> str:
    height, width = picture.pixels.shape[:2]
    sharp = ' class="px"' if max(height, width) < PIXELATED_BELOW else ""
    size = f'width="{width}" height="{height}"'
    return f'<img{sharp} src="{_png(picture.pixels)}" {size} alt="" title="{escape(picture.caption)}">'


def _png(pixels: np.ndarray) -> str:
    """uint8 (H, W, channels) as a data URI."""
    file = io.BytesIO()
    _picture(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _heat_map(table: np.ndarray, class_names: Sequence[str] | None) -> str:
    """Clusters (rows) by classes (columns), rows in the order of the classes that they are matched to."""
    num_classes, num_clusters = table.shape
    matched = np.full(num_clusters, num_classes)
    classes, clusters = linear_sum_assignment(table, maximize=True)
    matched[clusters] = classes
    order = np.lexsort((table.argmax(0), matched))  # the unmatched: by their most frequent class
    counts = table.T[order]  # (K, C)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    note = _line(["images of each class (column) in each cluster (row); shade: share of the cluster"])
    if table.size > CELLS:
        shade = np.empty((*shares.shape, 4), np.uint8)
        shade[..., :3] = HEAT
        shade[..., 3] = np.round(255 * shares)
        return f'{note}<img class="px map" src="{_png(shade)}" alt="contingency table">'
    names = [escape(_class_name(c, class_names)) for c in range(num_classes)]
    rows = [f"<tr><th></th>{''.join(f'<th><span>{name}</span></th>' for name in names)}</tr>"]
    for cluster, row, alphas in zip(order.tolist(), counts.tolist(), shares.tolist(), strict=True):
        cells = "".join(_cell(count, alpha) for count, alpha in zip(row, alphas, strict=True))
        rows.append(f"<tr><th>{cluster}</th>{cells}</tr>")
    return f'{note}<div class="scroll"><table class="heat">{"".join(rows)}</table></div>'


def _cell(count: int, share: float) -> str:
    if not count:
        return "<td></td>"
    colour = " ".join(map(str, HEAT))
    return f'<td style="background:rgb({colour}/{0.7 * share:.2f})">{count}</td>'  # pale enough to read on


def _curves(file: Path, results: Mapping) -> str:
    """One small plot a scalar; ACC, NMI and ARI of a rule share one."""
    curves = _read_curves(file)
    steps, epochs = results["steps"], results["epochs"]
    unit, scale = ("epoch", epochs / steps) if steps and epochs else ("step", 1.0)
    plots = []
    for rule, title in RULES.items():
        lines = {m: curves.pop(name) for m in METRICS if (name := f"eval/{rule}/{m}") in curves}
        if lines:
            percent = {m.upper(): (x * scale, 100 * y) for m, (x, y) in lines.items()}
            plots.append(_plot(f"{title}, percent", percent, unit))
    plots += [_plot(name, {"": (x * scale, y)}, unit) for name, (x, y) in curves.items()]
    return f'<div class="plots">{"".join(plots)}</div>' if plots else ""


def _read_curves(file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of every scalar that was logged as a finite number, at most POINTS each."""
    found: dict[str, list[tuple[float, float]]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            for name, text in row.items():
                if name not in ("step", "epoch") and text and math.isfinite(value := float(text)):
                    found.setdefault(name, []).append((float(row["step"]), value))
    averaged = {}
    for name, points in found.items():
        bins = np.array_split(np.array(points), min(len(points), POINTS))
        averaged[name] = tuple(np.array([b.mean(0) for b in bins]).T)
    return averaged


def _plot(title: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]], unit: str) -> str:
    left, top, right, bottom = 46, 8, 312, 140
    x_low, x_high, _ = _axis([x for x, _ in lines.values()], tight=True)
    y_low, y_high, y_ticks = _axis([y for _, y in lines.values()])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * (x - x_low) / (x_high - x_low),
            bottom - (bottom - top) * (y - y_low) / (y_high - y_low),
        )

    drawn = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        drawn.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        drawn.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    digits = ".0f" if x_high - x_low > 10 else ".3g"
    ends = (left, f"{x_low:{digits}}", "start"), (right, f"{x_high:{digits}}", "end")
    for at, text, anchor in (*ends, ((left + right) // 2, unit, "middle")):
        drawn.append(f'<text x="{at}" y="158" text-anchor="{anchor}">{text}</text>')
    for number, (xs, ys) in enumerate(lines.values()):
        points = [place(x, y) for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        drawn.append(f'<path class="line c{number}" d="M{path}"/>')
        x, y = points[-1]
        drawn.append(f'<circle class="c{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    last = "".join(
        f'<span><i class="c{n}"></i>{name} {_number(float(y[-1]))}</span>'
        for n, (name, (_, y)) in enumerate(lines.items())
    )
    svg = f'<svg viewBox="0 0 320 164" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{escape(title)}<br>{last}</figcaption>{svg}</figure>"


def _axis(values: Sequence[np.ndarray], *, tight: bool = False) -> tuple[float, float, list[float]]:
    """Limits that hold all values, and round numbers between them."""
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # too little for ticks in double precision
        low, high = (low, high + 1) if tight else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10, 20) if power * m >= rough)
    if not tight:
        low, high = step * math.floor(low / step), step * math.ceil(high / step)
    ticks = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return low, high, ticks


def _run(results: Mapping, config_text: str) -> str:
    timing = {_words(k.removesuffix("_seconds")): _timing(k, v) for k, v in results["timing"].items()}
    memory = results["peak_memory_bytes"]
    facts = {
        **timing,
        "peak memory": None if memory is None else f"{memory / 2**30:.2f} GiB",
        "steps": f"{results['steps']:,}",
        "processes": str(results["world_size"]),
        "commit": results["commit"],
        **results["versions"],
    }
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v is not None)
    command = results["command"] if isinstance(results["command"], str) else shlex.join(results["command"])
    return (
        f"<pre>{escape(command)}</pre><dl>{rows}</dl>"
        f"<details><summary>Configuration</summary><pre>{escape(config_text)}</pre></details>"
    )


def _timing(key: str, value: float | None) -> str | None:
    if value is None or not key.endswith("_seconds"):
        return None if value is None else _number(value)
    if value < 60:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _number(value: object) -> str:
    """Four significant digits for a fraction; other things as they are."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f5f6f8;--ink:#14171c;--dim:#5b6270;--line:#d9dde4;
 --c0:#2563eb;--c1:#d9560b;--c2:#0d8f63}
@media(prefers-color-scheme:dark){:root{--bg:#121417;--card:#1b1e23;--ink:#e8eaee;--dim:#9aa2b0;
 --line:#333942;--c0:#6ea0ff;--c1:#f08a48;--c2:#3cc592}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:1rem;background:var(--bg);color:var(--ink);
 font:16px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
h1,h2,h3,h4,p,figure,dl,dd{margin:0}
h1,h3,dd,pre,figcaption{overflow-wrap:anywhere}
h1{font-size:1.7rem}h2{font-size:1.25rem;margin:2.2rem 0 .6rem}h3{font-size:1.05rem}
h3 span{font-weight:400;margin-left:.4em}
h4{font-size:.8rem;font-weight:400;color:var(--dim);margin:.6rem 0 .2rem}
.dim,dt{color:var(--dim)}.dim,dl,figcaption{font-size:.9rem}
nav{margin-top:.9rem}nav a{color:var(--c0);margin-right:1rem}
.tiles div,article,figure,pre{padding:.8rem;background:var(--card);border:1px solid var(--line);
 border-radius:10px}
.tiles,.cards,.plots{display:grid;gap:.8rem}
.tiles{grid-template-columns:repeat(auto-fit,minmax(190px,1fr));margin:.9rem 0 .5rem}
.tiles b{font-size:2.1rem;line-height:1.1}
.tiles p{color:var(--dim);font-size:.85rem}
.cards{grid-template-columns:repeat(auto-fill,minmax(min(100%,58px*var(--wide) + 1.6rem),1fr))}
.strip{display:grid;grid-template-columns:repeat(var(--wide),1fr);gap:3px}
.strip img{width:100%;height:auto;display:block;border-radius:3px}
.px{image-rendering:pixelated}
.map{width:100%;max-width:720px;border:1px solid var(--line)}
.bar{height:4px;background:var(--line);margin-top:.35rem}
.bar i{display:block;height:100%;background:var(--c0)}
.scroll{overflow-x:auto}
.heat{border-spacing:2px;font-size:.8rem;margin-top:.5rem}
.heat td,.heat th{min-width:2.9rem;height:1.9rem;padding:0 .3rem;text-align:center;font-weight:400}
.heat td{border-radius:3px;box-shadow:inset 0 0 0 1px var(--line)}
.heat th{color:var(--dim)}
.heat th:first-child{position:sticky;left:0;background:var(--bg)}
.heat tr:first-child th{height:auto;vertical-align:bottom}
.heat th span{writing-mode:vertical-rl;transform:rotate(180deg);white-space:nowrap}
.plots{grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
figcaption span{color:var(--dim);margin-right:.9em;white-space:nowrap}
figcaption i{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.35em}
svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:var(--dim)}
.grid{stroke:var(--line)}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
path.c0{stroke:var(--c0)}path.c1{stroke:var(--c1)}path.c2{stroke:var(--c2)}
circle.c0{fill:var(--c0)}circle.c1{fill:var(--c1)}circle.c2{fill:var(--c2)}
i.c0{background:var(--c0)}i.c1{background:var(--c1)}i.c2{background:var(--c2)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.7rem 0}
pre{margin:.4rem 0;font-size:.85rem;white-space:pre-wrap}
summary{cursor:pointer}
@media(max-width:560px){.tiles{grid-template-columns:1fr}
 .strip{grid-template-columns:repeat(var(--narrow),1fr)}}
"""
