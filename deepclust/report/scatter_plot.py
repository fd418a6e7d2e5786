"""The map of the embeddings as HTML: drawings of the points, buttons, legends and the pictures of the images.

A group is a cluster or a class. Each group has a marker: a number that stands for a colour and a shape, dot or square.
The points are strokes of length zero, which round or square line caps turn into dots or squares; that takes a tenth of
the text of circles. Buttons work by the style sheet alone; only pointing at a point needs the script of map_script.py.
"""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from deepclust.report.embedding_map import MAX_PICTURE_SIDE, EmbeddingMap
from deepclust.report.heatmap import match_clusters_to_classes
from deepclust.report.html_fragments import class_name, render_note
from deepclust.report.sprites import make_sprite

WIDTH, MAX_HEIGHT, MARGIN = 1000, 800, 24  # of the drawing, in its own units
MAX_SPRITE_BYTES = 1_600_000  # of the pictures of all points as text
PICTURE_SIDES = (MAX_PICTURE_SIDE, 56, 48, 40, 32, 24, 16)  # pixels; the largest that fits is taken
# The ten colours of Petroff, Accessible Color Sequences for Data Visualization (2021), which colour-blind eyes can tell
# apart too. As dots, its two greys look alike; the second of them is replaced by a blue that is far from all others.
COLOURS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#1f2eff", "#92dadb")
NUM_MARKERS = 2 * len(COLOURS)  # each colour as dots, then each colour as squares
UNLABELLED_MARKER = NUM_MARKERS  # of images without a label
MAX_GROUP_NAMES = 30  # on the map, those of the largest groups
FEW_POINTS, SHIFT_OF_NAME = 100, 24  # the name of a group would hide one of a few markers
LETTER_SIZE = 19, 36  # largest width and height of a letter on the map, in units of the drawing


def render_scatter_plot(
    embedding: EmbeddingMap | None, contingency_table: np.ndarray | None, class_names: Sequence[str] | None
) -> str:
    """Return the HTML of the map, coloured by cluster and, if there are labels, by class.

    contingency_table: counts (C, K) that match clusters to classes; a class gets the marker of its cluster.
    """
    if embedding is None:
        return ""
    labels = np.full(len(embedding.indices), -1) if embedding.labels is None else embedding.labels
    has_labels = bool((labels >= 0).any())
    order = np.lexsort((labels, embedding.assignments))  # of the points in the drawings
    projections = {name: _scale_to_drawing(points)[order] for name, points in embedding.projections.items()}
    assignments, labels = embedding.assignments[order], labels[order]
    first = next(iter(projections.values()))
    cluster_markers = _choose_markers(_find_medoids(first, assignments), {})
    class_markers = {-1: UNLABELLED_MARKER}
    if has_labels:
        class_of_cluster = [] if contingency_table is None else match_clusters_to_classes(contingency_table).tolist()
        cluster_of_class = {int(c): k for k, c in enumerate(class_of_cluster)}
        matched = {c: cluster_markers[k] for c, k in cluster_of_class.items() if k in cluster_markers}
        class_markers |= _choose_markers(_find_medoids(first, labels), matched)
    cluster_titles = {cluster: str(cluster) for cluster in cluster_markers}
    shown_classes = np.unique(labels).tolist()
    class_titles = {c: class_name(c, class_names) for c in shown_classes if c >= 0} | {-1: "no label"}

    buttons = _render_radio_buttons("place", list(projections))
    if has_labels:
        buttons += f'<br class="narrow">{_render_radio_buttons("colour", ["by cluster", "by label"])}'
    drawings = []
    for number, (name, points) in enumerate(projections.items()):
        paths = _render_points(points, assignments, labels, cluster_markers, class_markers)
        shift = SHIFT_OF_NAME if len(points) < FEW_POINTS else 0
        titles = _render_group_names("k", _find_medoids(points, assignments), cluster_titles, shift)
        titles += _render_group_names("l", _find_medoids(points, labels), class_titles, shift)
        size = f"{WIDTH} {points[:, 1].max() + MARGIN}"
        drawings.append(
            f'<svg class="p{number}" viewBox="0 0 {size}" role="img" aria-label="{escape(name)}">'
            f'{paths}{titles}<circle class="ring" r="16"/></svg>'
        )
    legends = _render_legend("k", cluster_markers, cluster_titles)
    if has_labels:
        legends += _render_legend("l", {c: class_markers[c] for c in shown_classes}, class_titles)
    data: dict[str, Any] = {
        "names": [embedding.image_names[i] for i in order.tolist()],
        "confidence": np.round(embedding.confidence[order], 3).tolist(),
        "labels": class_titles if has_labels else None,
    }
    sprite = ""
    if embedding.pictures is not None:
        uri, data["tile"] = make_sprite(embedding.pictures[order], sides=PICTURE_SIDES, max_bytes=MAX_SPRITE_BYTES)
        sprite = f'<img id="sprite" src="{uri}" alt="" hidden>'
    # "<" is escaped because "</script>" would end the data and "<!--" would start a comment.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'{render_note(_describe_map(embedding))}<p class="dim screen">Point at a marker to see its image.</p>'
        f'<div class="embedding">{buttons}'
        '<div class="stage" tabindex="0" aria-label="map of the images; the arrow keys move from image to image">'
        f'{"".join(drawings)}<output class="tip" hidden><canvas></canvas><span></span></output></div>{legends}'
        f'{sprite}<script type="application/json" id="points">{text}</script></div>'
    )


def _describe_map(embedding: EmbeddingMap) -> list[str]:
    """Return the notes above the map."""
    count = f"{len(embedding.indices):,}"
    is_complete = len(embedding.indices) == embedding.num_images
    notes = [f"all {count} images" if is_complete else f"{count} of {embedding.num_images:,} images, drawn at random"]
    notes.append("positions: features projected to two dimensions")
    if "t-SNE" in embedding.projections:
        notes.append("t-SNE keeps neighbours together; distances between groups and sizes of groups mean little")
    if len(np.unique(embedding.assignments)) > len(COLOURS):
        notes.append("more clusters than colours: clusters that are far apart share one")
    return notes


def _scale_to_drawing(points: np.ndarray) -> np.ndarray:
    """Return points (P, 2) in units of the drawing, as whole numbers: y points downwards, both axes have one scale."""
    low, extent = points.min(0), np.ptp(points, axis=0)
    available = np.array([WIDTH, MAX_HEIGHT]) - 2 * MARGIN
    scale = min((a / e for a, e in zip(available, extent, strict=True) if e > 0), default=1.0)
    scaled = (points - low) * scale
    scaled[:, 0] += (WIDTH - scale * extent[0]) / 2
    scaled[:, 1] = MARGIN + scale * extent[1] - scaled[:, 1]
    return np.round(scaled).astype(int)


def _find_medoids(points: np.ndarray, groups: np.ndarray) -> dict[int, np.ndarray]:
    """Return the medoid (2,) of the points of each group, largest group first.

    Unlike the mean, a medoid lies within the group even if the group is in several pieces. Group -1, the images without
    a label, has none.
    """
    unique_groups, counts = np.unique(groups, return_counts=True)
    by_size = unique_groups[np.argsort(-counts, kind="stable")].tolist()
    members = {group: points[groups == group] for group in by_size if group >= 0}
    return {group: own[cdist(own, own).sum(0).argmin()] for group, own in members.items()}


def _choose_markers(centres: dict[int, np.ndarray], given: dict[int, int]) -> dict[int, int]:
    """Return a marker for each group in `centres`; groups in `given` keep the marker that they have there.

    Unused colours are taken first, then the marker whose groups are the farthest away. A group with the same colour but
    the other shape counts as if it were twice as far away.
    """
    markers = {group: marker for group, marker in given.items() if group in centres}
    for group, centre in centres.items():
        if group in markers:
            continue
        nearest = np.full(NUM_MARKERS, np.inf)  # distance to the nearest group with this marker
        if markers:
            used = np.array(list(markers.values()))
            distance = np.linalg.norm(np.stack([centres[g] for g in markers]) - centre, axis=1)
            np.minimum.at(nearest, used, distance)
            np.minimum.at(nearest, (used + len(COLOURS)) % NUM_MARKERS, 2 * distance)
        markers[group] = int(nearest.argmax())
    return markers


def _render_radio_buttons(name: str, choices: Sequence[str]) -> str:
    """Return radio buttons, the first of them checked."""
    buttons = []
    for number, choice in enumerate(choices):
        checked = "" if number else " checked"
        buttons.append(f'<input type="radio" name="{name}" id="{name}{number}"{checked}>')
        buttons.append(f'<label for="{name}{number}">{choice}</label>')
    return "".join(buttons)


def _render_points(
    points: np.ndarray,
    assignments: np.ndarray,
    labels: np.ndarray,
    cluster_markers: dict[int, int],
    class_markers: dict[int, int],
) -> str:
    """Return one path for each pair of cluster and label; points (P, 2) are sorted by cluster, then by label."""
    pairs, starts = np.unique(np.stack([assignments, labels], 1), axis=0, return_index=True)
    paths = []
    for (cluster, label), members in zip(pairs.tolist(), np.split(points, starts[1:]), strict=True):
        strokes = "".join(f"M{x} {y}h0" for x, y in members.tolist())
        css_classes = f"k{cluster_markers[cluster]} l{class_markers[label]}"
        paths.append(f'<path class="{css_classes}" data-k="{cluster}" data-l="{label}" d="{strokes}"/>')
    diameter = round(float(np.clip(340 / np.sqrt(len(points)), 8, 16)))
    return f'<g stroke-width="{diameter}">{"".join(paths)}</g>'


def _render_group_names(kind: str, centres: dict[int, np.ndarray], titles: dict[int, str], shift: int) -> str:
    """Return the names of groups at their centres. A name that would cover that of a larger group is left out.

    kind: `k` for clusters, `l` for classes.
    shift: how far above its centre a name is; at the upper edge of the map it is below.
    """
    drawn: list[tuple[float, float, float]] = []  # x, y and half the width of a name
    texts = []
    for group, (x, centre) in centres.items():
        y = centre + shift if centre < 2 * shift else centre - shift
        if len(drawn) == MAX_GROUP_NAMES:
            break
        half_width = LETTER_SIZE[0] * len(titles[group]) / 2
        if any(abs(x - u) < half_width + other and abs(y - v) < LETTER_SIZE[1] for u, v, other in drawn):
            continue
        drawn.append((x, y, half_width))
        texts.append(f'<text x="{x:.0f}" y="{y:.0f}">{escape(titles[group])}</text>')
    return f'<g class="by-{kind}">{"".join(texts)}</g>'


def _render_legend(kind: str, markers: dict[int, int], titles: dict[int, str]) -> str:
    """Return the marker and the name of each group in their order, images without a label last."""
    entries = "".join(
        f'<span data-{kind}="{group}"><i class="{kind}{markers[group]}"></i>{escape(titles[group])}</span>'
        for group in sorted(markers, key=lambda group: (group < 0, group))
    )
    return f'<div class="legend by-{kind}">{entries}</div>'
