"""The contingency table of clusters and classes, a confusion matrix without a matching, as a heat map."""

from collections.abc import Sequence
from html import escape

import numpy as np
from scipy.optimize import linear_sum_assignment

from deepclust.report.html_fragments import class_name, encode_data_uri, render_note

CELL_COLOUR = (37, 99, 235)  # red, green, blue
MAX_NUMBERED_CELLS = 40 * 40  # a larger table is drawn as one picture, without its numbers


def match_clusters_to_classes(contingency_table: np.ndarray) -> np.ndarray:
    """Return the class of each cluster (K,) in the best one-to-one matching by counts (C, K).

    It is C for the clusters that are left when all classes are taken.
    """
    num_classes, num_clusters = contingency_table.shape
    matched = np.full(num_clusters, num_classes)
    classes, clusters = linear_sum_assignment(contingency_table, maximize=True)
    matched[clusters] = classes
    return matched


def render_heat_map(contingency_table: np.ndarray | None, class_names: Sequence[str] | None) -> str:
    """Return the HTML of counts (C, K): classes are columns, clusters are rows sorted by their matched classes."""
    if contingency_table is None or not contingency_table.any():
        return ""
    # Clusters without a matched class come last, by their most frequent class.
    order = np.lexsort((contingency_table.argmax(0), match_clusters_to_classes(contingency_table)))
    counts = contingency_table.T[order]  # (K, C)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    note = "images of each class (column) in each cluster (row); shade: share of the cluster"
    if contingency_table.size > MAX_NUMBERED_CELLS:
        pixels = np.empty((*shares.shape, 4), np.uint8)
        pixels[..., :3] = CELL_COLOUR
        pixels[..., 3] = np.round(255 * shares)
        picture = f'<img class="px map" src="{encode_data_uri(pixels)}" alt="contingency table">'
        return f"{render_note([note, 'rows: sorted by their matched class'])}{picture}"
    names = [escape(class_name(c, class_names)) for c in range(len(contingency_table))]
    rows = [f"<tr><th></th>{''.join(f'<th><span>{name}</span></th>' for name in names)}</tr>"]
    for cluster, row_counts, row_shares in zip(order.tolist(), counts.tolist(), shares.tolist(), strict=True):
        cells = "".join(_render_cell(count, share) for count, share in zip(row_counts, row_shares, strict=True))
        rows.append(f"<tr><th>{cluster}</th>{cells}</tr>")
    # The style sheet prints many columns (--n) in smaller letters, because paper does not scroll.
    html_table = f'<table class="heat" style="--n:{len(names)}">{"".join(rows)}</table>'
    return f'{render_note([note])}<div class="scroll">{html_table}</div>'


def _render_cell(count: int, share: float) -> str:
    if not count:
        return "<td></td>"
    colour = " ".join(map(str, CELL_COLOUR))
    opacity = 0.7 * share  # pale enough for a readable number
    return f'<td style="background:rgb({colour}/{opacity:.2f})">{count}</td>'
