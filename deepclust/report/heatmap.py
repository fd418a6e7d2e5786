"""The contingency table of clusters and classes, as a heat map."""

from collections.abc import Sequence
from html import escape

import numpy as np
from scipy.optimize import linear_sum_assignment

from deepclust.report.html_fragments import class_name, data_uri, line

HEAT = (37, 99, 235)  # colour
CELLS = 40 * 40  # a larger table is drawn as one picture, without its numbers


def matching(table: np.ndarray) -> np.ndarray:
    """The class that each cluster (K,) is matched to, one to one, by counts (C, K); C where there is none left."""
    num_classes, num_clusters = table.shape
    matched = np.full(num_clusters, num_classes)
    classes, clusters = linear_sum_assignment(table, maximize=True)
    matched[clusters] = classes
    return matched


def heat_map(table: np.ndarray | None, class_names: Sequence[str] | None) -> str:
    """Clusters (rows) by classes (columns), rows in the order of the classes that they are matched to."""
    if table is None or not table.any():
        return ""
    order = np.lexsort((table.argmax(0), matching(table)))  # the unmatched: by their most frequent class
    counts = table.T[order]  # (K, C)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    note = "images of each class (column) in each cluster (row); shade: share of the cluster"
    if table.size > CELLS:
        shade = np.empty((*shares.shape, 4), np.uint8)
        shade[..., :3] = HEAT
        shade[..., 3] = np.round(255 * shares)
        picture = f'<img class="px map" src="{data_uri(shade)}" alt="contingency table">'
        return f"{line([note, 'rows in the order of the matched classes'])}{picture}"
    names = [escape(class_name(c, class_names)) for c in range(len(table))]
    rows = [f"<tr><th></th>{''.join(f'<th><span>{name}</span></th>' for name in names)}</tr>"]
    for cluster, row, alphas in zip(order.tolist(), counts.tolist(), shares.tolist(), strict=True):
        cells = "".join(_cell(count, alpha) for count, alpha in zip(row, alphas, strict=True))
        rows.append(f"<tr><th>{cluster}</th>{cells}</tr>")
    # columns: printed smaller the more there are, as paper does not scroll
    return (
        f'{line([note])}<div class="scroll"><table class="heat" style="--n:{len(names)}">{"".join(rows)}</table></div>'
    )


def _cell(count: int, share: float) -> str:
    if not count:
        return "<td></td>"
    colour = " ".join(map(str, HEAT))
    return f'<td style="background:rgb({colour}/{0.7 * share:.2f})">{count}</td>'  # pale enough to read on
