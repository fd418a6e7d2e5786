"""The map of the embeddings as a drawing: points, colours, legends, the pictures, and the script that shows them.

The points are paths of strokes without length, which round or square ends turn into dots: a tenth of the text of
circles. Switching is by style sheet; only pointing at a point needs the script.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from deepclust.report.embedding_map import TILE, EmbeddingMap
from deepclust.report.heatmap import matching
from deepclust.report.html_fragments import PIXELATED_BELOW, class_name, data_uri, line, shrink

WIDTH, HEIGHT, MARGIN = 1000, 800, 24  # of the drawing, in its own units; the height is the largest
SPRITE_BYTES = 1_600_000  # of all pictures as text
SIDES = (TILE, 56, 48, 40, 32, 24, 16)  # pixels of a picture; the largest that fits is taken
QUALITY = 80  # of JPEG
JPEG_BLOCK = 8  # pixels
# Petroff, Accessible Color Sequences for Data Visualization (2021), the ten, apart for colour-blind eyes too; but for
# the second of its greys, which as a dot is too like the first, a blue that is far from all.
COLOURS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#1f2eff", "#92dadb")
SLOTS = 2 * len(COLOURS)  # each colour as dots and as squares
UNKNOWN = SLOTS  # for images without a label
NAMES = 30  # on the map, of the largest groups
LETTER = 19, 36  # width and height of a letter on the map, at most


def scatter(shown: EmbeddingMap | None, table: np.ndarray | None, class_names: Sequence[str] | None) -> str:
    """The map, coloured by cluster and, with labels, by class; a class has the colour of its matched cluster."""
    if shown is None:
        return ""
    labels = np.full(len(shown.rows), -1) if shown.labels is None else shown.labels
    known = bool((labels >= 0).any())
    order = np.lexsort((labels, shown.clusters))  # of the points in the drawing
    places = {name: _fit(xy)[order] for name, xy in shown.places.items()}
    first = next(iter(places.values()))
    clusters, labels = shown.clusters[order], labels[order]
    cluster_slots = _slots(_centres(first, clusters), {})
    label_slots = {-1: UNKNOWN}
    if known:
        matched = {} if table is None else {int(c): int(k) for k, c in enumerate(matching(table))}
        given = {c: cluster_slots[k] for c, k in matched.items() if k in cluster_slots}
        label_slots |= _slots(_centres(first, labels), given)
    names = {c: class_name(c, class_names) for c in np.unique(labels).tolist() if c >= 0} | {-1: "no label"}

    switches = _switch("place", list(places))
    if known:
        switches += f'<br class="narrow">{_switch("colour", ["by cluster", "by label"])}'
    drawings = [
        _drawing(at, name, xy, clusters, labels, cluster_slots, label_slots, names)
        for at, (name, xy) in enumerate(places.items())
    ]
    legends = _legend("k", cluster_slots, {k: str(k) for k in cluster_slots})
    if known:
        legends += _legend("l", {c: label_slots[c] for c in np.unique(labels).tolist()}, names)
    data: dict[str, Any] = {
        "names": [shown.names[i] for i in order.tolist()],
        "confidence": np.round(shown.confidence[order], 3).tolist(),
        "labels": names if known else None,
    }
    sprite = ""
    if shown.pictures is not None:
        uri, data["tile"] = _sprite(shown.pictures[order])
        sprite = f'<img id="sprite" src="{uri}" alt="" hidden>'
    # a browser takes what follows "<" in a script for an end of it, or for a comment
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'{line(_said(shown))}<p class="dim screen">Point at one to see it.</p><div class="embedding">{switches}'
        '<div class="stage" tabindex="0" aria-label="map of the images; the arrow keys go from one to the next">'
        f'{"".join(drawings)}<output class="tip" hidden><canvas></canvas><span></span></output></div>{legends}'
        f'{sprite}<script type="application/json" id="points">{text}</script></div>'
    )


def _said(shown: EmbeddingMap) -> list[str]:
    count = f"{len(shown.rows):,}"
    said = [
        f"all {count} images" if len(shown.rows) == shown.total else f"{count} of {shown.total:,} images, at random"
    ]
    said.append("each where its features are, in two dimensions")
    if "t-SNE" in shown.places:
        said.append("t-SNE keeps neighbours together; distances between groups and their sizes mean little")
    if len(np.unique(shown.clusters)) > len(COLOURS):
        said.append("colours repeat, far from each other")
    return said


def _fit(places: np.ndarray) -> np.ndarray:
    """Places (P, 2) in the units of the drawing, y downwards, both axes to one scale; whole numbers."""
    low, extent = places.min(0), np.ptp(places, axis=0)
    room = np.array([WIDTH, HEIGHT]) - 2 * MARGIN
    scale = min((r / e for r, e in zip(room, extent, strict=True) if e > 0), default=1.0)
    placed = (places - low) * scale
    placed[:, 0] += (WIDTH - scale * extent[0]) / 2
    placed[:, 1] = MARGIN + scale * extent[1] - placed[:, 1]
    return np.round(placed).astype(int)


def _centres(places: np.ndarray, groups: np.ndarray) -> dict[int, np.ndarray]:
    """The medoid's place (2,) of each group but -1, the largest group first: it is in the group also where that is in
    pieces."""
    found, counts = np.unique(groups, return_counts=True)
    by_size = found[np.argsort(-counts, kind="stable")].tolist()
    members = {group: places[groups == group] for group in by_size if group >= 0}
    return {group: own[cdist(own, own).sum(0).argmin()] for group, own in members.items()}


def _slots(centres: dict[int, np.ndarray], given: dict[int, int]) -> dict[int, int]:
    """A slot for every group: unused colours first, then the one whose bearers are the farthest away.

    The other shape of a colour counts as twice as far. `given` are slots of some of the groups.
    """
    slots = {group: slot for group, slot in given.items() if group in centres}
    for group, centre in centres.items():
        if group in slots:
            continue
        nearest = np.full(SLOTS, np.inf)
        if slots:
            taken = np.array(list(slots.values()))
            distance = np.linalg.norm(np.stack([centres[g] for g in slots]) - centre, axis=1)
            np.minimum.at(nearest, taken, distance)
            np.minimum.at(nearest, (taken + len(COLOURS)) % SLOTS, 2 * distance)
        slots[group] = int(nearest.argmax())
    return slots


def _switch(group: str, names: Sequence[str]) -> str:
    buttons = []
    for n, name in enumerate(names):
        checked = "" if n else " checked"
        buttons.append(f'<input type="radio" name="{group}" id="{group}{n}"{checked}>')
        buttons.append(f'<label for="{group}{n}">{name}</label>')
    return "".join(buttons)


def _drawing(
    at: int,
    name: str,
    places: np.ndarray,
    clusters: np.ndarray,
    labels: np.ndarray,
    cluster_slots: dict[int, int],
    label_slots: dict[int, int],
    names: dict[int, str],
) -> str:
    """One projection; points (P, 2) in the order of (cluster, label), a path for every pair."""
    pairs, starts = np.unique(np.stack([clusters, labels], 1), axis=0, return_index=True)
    paths = []
    for (cluster, label), points in zip(pairs.tolist(), np.split(places, starts[1:]), strict=True):
        strokes = "".join(f"M{x} {y}h0" for x, y in points.tolist())
        kinds = f"k{cluster_slots[cluster]} l{label_slots[label]}"
        paths.append(f'<path class="{kinds}" data-k="{cluster}" data-l="{label}" d="{strokes}"/>')
    dot = round(float(np.clip(340 / np.sqrt(len(places)), 8, 16)))
    numbers = {cluster: str(cluster) for cluster in cluster_slots}
    said = _texts("k", _centres(places, clusters), numbers) + _texts("l", _centres(places, labels), names)
    size = f"{WIDTH} {places[:, 1].max() + MARGIN}"
    return (
        f'<svg class="p{at}" viewBox="0 0 {size}" role="img" aria-label="{escape(name)}">'
        f'<g stroke-width="{dot}">{"".join(paths)}</g>{said}'
        '<circle class="ring" r="16"/></svg>'
    )


def _texts(kind: str, centres: dict[int, np.ndarray], names: dict[int, str]) -> str:
    """The names of groups at their centres, but where a larger one has its own."""
    drawn: list[tuple[float, float, float]] = []
    texts = []
    for group, (x, y) in centres.items():
        if len(drawn) == NAMES:
            break
        half = LETTER[0] * len(names[group]) / 2
        if any(abs(x - u) < half + other and abs(y - v) < LETTER[1] for u, v, other in drawn):
            continue
        drawn.append((x, y, half))
        texts.append(f'<text x="{x:.0f}" y="{y:.0f}">{escape(names[group])}</text>')
    return f'<g class="by-{kind}">{"".join(texts)}</g>'


def _legend(kind: str, slots: dict[int, int], names: dict[int, str]) -> str:
    chips = "".join(
        f'<span data-{kind}="{group}"><i class="{kind}{slots[group]}"></i>{escape(names[group])}</span>'
        for group in sorted(slots, key=lambda group: (group < 0, group))
    )
    return f'<div class="legend by-{kind}">{chips}</div>'


def _sprite(pictures: np.ndarray) -> tuple[str, dict[str, int | bool]]:
    """All pictures (P, h, w, channels) on one sheet as a data URI, and where to find each."""
    longest = max(pictures.shape[1:3])
    if longest <= PIXELATED_BELOW:
        uri = data_uri(_sheet(pictures, block=1))
        if len(uri) <= SPRITE_BYTES // 2:
            return uri, _tile(pictures, block=1)
    for side in dict.fromkeys(min(side, longest) for side in SIDES):
        small = np.stack([shrink(pixels, side) for pixels in pictures])
        uri = data_uri(_sheet(small, block=JPEG_BLOCK), quality=QUALITY, subsampling=0)
        if len(uri) <= SPRITE_BYTES:
            break
    return uri, _tile(small, block=JPEG_BLOCK)


def _tile(pictures: np.ndarray, *, block: int) -> dict[str, int | bool]:
    count, height, width = pictures.shape[:3]
    across, down = width + -width % block, height + -height % block
    sharp = max(height, width) < PIXELATED_BELOW
    return {"w": width, "h": height, "dx": across, "dy": down, "columns": _columns(count), "sharp": sharp}


def _columns(count: int) -> int:
    return math.ceil(math.sqrt(count))


def _sheet(pictures: np.ndarray, *, block: int) -> np.ndarray:
    """Pictures (P, h, w, channels) in rows, each filled up to whole blocks, which JPEG codes as one."""
    count, height, width, channels = pictures.shape
    columns = _columns(count)
    rows = math.ceil(count / columns)
    full = ((0, rows * columns - count), (0, -height % block), (0, -width % block), (0, 0))
    padded = np.pad(pictures, full, mode="edge")
    tall, wide = padded.shape[1:3]
    grid = padded.reshape(rows, columns, tall, wide, channels).swapaxes(1, 2)
    return grid.reshape(rows * tall, columns * wide, channels)
