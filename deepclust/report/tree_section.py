"""The section of a report on the tree of a method that finds one: how its clusters join, and its levels as a table."""

from collections.abc import Mapping, Sequence

from deepclust.clustering.merge_order import Merge
from deepclust.report.cluster_pictures import ClusterPictures
from deepclust.report.findings_sections import TAKE_FEWER, render_tree
from deepclust.report.html_fragments import count_of, format_number, render_note

LEVELS_BESIDE = 4  # of the tree, that are shown on either side of the number of clusters


def render_cluster_tree(tree: Mapping | None, clusters: Sequence[ClusterPictures], num_clusters: int) -> str:
    """Return the HTML of a tree; without one, it is empty.

    tree: the entry `tree` of results.json; `num_clusters` are those that were cut out of it.
    """
    if tree is None:
        return ""
    counts = tree["num_clusters"]
    facts = [f"{count_of(len(counts) - 1, 'round')} from {counts[0]:,} images to {count_of(counts[-1], 'cluster')}"]
    if tree["dendrogram_purity"] is not None:
        facts.append(f"dendrogram purity {tree['dendrogram_purity']:.3f}")
    merges = [Merge(**merge) for merge in tree["merges"]]
    notes = ["the round in which they join", TAKE_FEWER]
    drawn = render_tree(merges, {}, clusters, notes=notes, format_distance=lambda number: f"round {number:.0f}")
    return render_note(facts) + drawn + _render_levels(tree, num_clusters)


def _render_levels(tree: Mapping, num_clusters: int) -> str:
    counts = tree["num_clusters"]
    last_rounds = [r for r in range(len(counts)) if r + 1 == len(counts) or counts[r + 1] != counts[r]]
    nearest = min(range(len(last_rounds)), key=lambda i: abs(counts[last_rounds[i]] - num_clusters))
    rows = "".join(
        f"<tr><td>{r}</td><td>{counts[r]:,}</td><td>{_format(tree['thresholds'][r])}</td>"
        f"<td>{tree['modularities'][r]:.3f}</td></tr>"
        for r in last_rounds[max(nearest - LEVELS_BESIDE, 0) : nearest + LEVELS_BESIDE + 1]
    )
    head = "<tr><th>round</th><th>clusters</th><th>least average similarity</th><th>modularity</th></tr>"
    return f"<table>{head}{rows}</table>"


def _format(value: float | None) -> str:
    return "" if value is None else format_number(value)
