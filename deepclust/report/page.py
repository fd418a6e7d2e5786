"""The page report.html: scores, clusters as pictures, plots and how the run was made, all in one file."""

import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from deepclust.engine.output_files import write_bytes
from deepclust.report.cluster_pictures import ClusterPictures, Picture, render_clusters
from deepclust.report.curves import render_curves, render_number_of_clusters
from deepclust.report.embedding_map import EmbeddingMap
from deepclust.report.findings import Findings
from deepclust.report.findings_sections import render_duplicates, render_outliers, render_tree
from deepclust.report.gallery_script import SCRIPT as GALLERY_SCRIPT
from deepclust.report.generated_images import render_generated_images
from deepclust.report.heatmap import render_heat_map
from deepclust.report.html_document import render_document
from deepclust.report.html_fragments import count_of, format_number, key_to_words, render_note
from deepclust.report.map_script import SCRIPT as MAP_SCRIPT
from deepclust.report.scatter_plot import render_scatter_plot
from deepclust.report.style_sheet import STYLE
from deepclust.report.tree_section import render_cluster_tree

METRICS = {
    "acc": "images in the cluster that is matched to their class, one cluster per class",
    "nmi": "information that clusters and classes share; 100 is the same grouping",
    "ari": "pairs of images that are rightly together or apart; 0 is chance",
}
RULE_TITLES = {
    "method": "the method's own rule",
    "kmeans": "k-means on its features",
    "kmeans_on_pixels": "k-means on the pixels",
}
# Of sections whose headings are not their names.
HEADINGS = {
    "Generated": "Generated images",
    "Tree": "Tree of the clusters",
    "Number": "Number of clusters",
    "Alike": "Which clusters are alike",
    "Outliers": "Belong nowhere",
    "Duplicates": "Near-duplicates",
}
# The viewer of enlarged pictures, and the tools for names of clusters; the script of the gallery shows them.
VIEWER = (
    '<dialog class="viewer"><canvas></canvas><p class="caption"></p><p><button class="back">previous</button> '
    '<button class="next">next</button> <a target="_blank">open the file</a> <button class="close">close</button></p>'
    "</dialog>"
)
NAME_TOOLS = (
    '<p class="names dim screen" data-names="{names}" hidden>Click a name to change it. '
    '<button class="save">Download names.json</button> <button class="copy">Copy</button> <output></output></p>'
)


def write_report(
    path: Path,
    *,
    results: Mapping,
    clusters: Sequence[ClusterPictures],
    embedding: EmbeddingMap | None,
    contingency_table: np.ndarray | None,
    class_names: Sequence[str] | None,
    metrics_file: Path | None,
    config_text: str,
    findings: Findings | None = None,
    finding_pictures: tuple[Sequence[Picture], Sequence[Sequence[Picture]]] = ((), ()),
    drawers: Mapping[int, str] | None = None,
    samples: np.ndarray | None = None,
) -> None:
    """Write the page to `path`. A section without content is left out.

    results: the content of results.json; its `command`, and config_text, are shown as they are.
    contingency_table: counts (C, K) of the images of each class in each cluster.
    metrics_file: CSV with a column `step` and one for each scalar, with empty cells where it was not logged.
    findings: what `deepclust cluster` finds beside the clusters; finding_pictures: of outliers, and of duplicates.
    drawers: the HTML of a drawer with all images, by cluster; with drawers, pictures are enlarged on a click.
    samples: generated images of each cluster, uint8 (K, S, H, W, channels).
    """
    names = None if findings is None else findings.names
    num_nonempty = int(results["num_clusters"] - results["health"]["empty_clusters"])
    sections = {
        "Clusters": render_clusters(clusters, num_nonempty=num_nonempty, names=names, drawers=drawers),
        "Generated": render_generated_images(samples),
        "Tree": render_cluster_tree(results.get("tree"), clusters, results["num_clusters"]),
        "Map": render_scatter_plot(embedding, contingency_table, class_names),
        "Classes": render_heat_map(contingency_table, class_names),
        "Number": render_number_of_clusters(results.get("number")),
        "Curves": render_curves(
            metrics_file,
            rule_titles=RULE_TITLES,
            final_values=_get_final_values(results),
            steps=results["steps"],
            epochs=results["epochs"],
        ),
        "Run": _render_run(results, config_text),
    }
    if findings is not None:
        sections["Clusters"] = _render_name_tools(findings, clusters) + sections["Clusters"]
        found = {
            "Alike": render_tree(findings.merges, findings.names, clusters),
            "Duplicates": render_duplicates(findings, finding_pictures[1]),
            "Outliers": render_outliers(findings, finding_pictures[0]),
        }
        sections = {"Clusters": sections.pop("Clusters"), **found, **sections}
        if sections["Curves"]:  # how k-means or LNSCC went says nothing of photos: it is there for whom wonders
            sections["Curves"] = f"<details><summary>How the training went</summary>{sections['Curves']}</details>"
    shown = {name: content for name, content in sections.items() if content}
    title, links = _make_title(results), " ".join(f'<a href="#{name}">{name}</a>' for name in shown)
    parts = [f"<header><h1>{escape(title)}</h1>{_render_header(results, clusters)}<nav>{links}</nav></header>"]
    parts += [
        f'<section id="{name}"><h2>{HEADINGS.get(name, name)}</h2>{content}</section>'
        for name, content in shown.items()
    ]
    page = render_document(
        "\n".join([*parts, VIEWER] if drawers else parts),
        title=title,
        style=STYLE,
        script=GALLERY_SCRIPT * bool(drawers) + MAP_SCRIPT * ("Map" in shown),
        body_class="viewable" if drawers else "",
    )
    write_bytes(path, page.encode("utf-8", errors="replace"))  # a file name may not be valid text


def _render_header(results: Mapping, clusters: Sequence[ClusterPictures]) -> str:
    """Return the HTML of what was clustered and of the scores; without labels, of the sizes of the clusters."""
    num_images, num_clusters, epochs = (f"{results[key]:,}" for key in ("num_images", "num_clusters", "epochs"))
    facts = [f"{num_images} images", f"{num_clusters} clusters", results["backbone"], f"{epochs} epochs"]
    facts.append(f"seed {results['seed']}")
    top = render_note(facts)
    if "trust" in results:  # of `deepclust cluster`, whose title has the numbers; the rest is in the details
        top = f'<p class="trust">{escape(results["trust"]["message"])}</p>'
    health = dict(results["health"])
    scores_by_rule = {**(results["scores"] or {}), **(results.get("baseline") or {})}
    scored_rules = [(title, scores) for rule, title in RULE_TITLES.items() if (scores := scores_by_rule.get(rule))]
    if scored_rules:
        (first_title, first_scores), *others = scored_rules
        tiles = [(f"{100 * first_scores[m]:.1f}", m.upper(), meaning) for m, meaning in METRICS.items()]
        notes = [[f"in percent, for {first_title}"]]
        notes += [[title, *(f"{m.upper()} {100 * scores[m]:.1f}" for m in METRICS)] for title, scores in others]
    else:
        evenness, num_empty = f"{100 * health.pop('cluster_size_entropy'):.1f}", int(health.pop("empty_clusters"))
        tiles = [
            (evenness, "evenness", "of the cluster sizes, in percent; 100: all the same, 0: all images in one cluster"),
            (format_number(num_empty), "empty", f"of the {num_clusters} clusters have no images"),
        ]
        if clusters:
            share = f"{100 * clusters[0].share:.1f}"
            tiles.append((share, "largest", "percent of the images are in the largest cluster"))
        notes = [["without labels, the clusters cannot be scored"]]
        if "trust" in results:  # whose message says how large and how many they are
            tiles, notes = [], []
    if health:
        notes.append([f"{key_to_words(key)} {format_number(value)}" for key, value in health.items()])
    cards = "".join(f"<div><b>{value}</b> {name}<p>{meaning}</p></div>" for value, name, meaning in tiles)
    return f'{top}<div class="tiles">{cards}</div>{"".join(map(render_note, notes))}'


def _make_title(results: Mapping) -> str:
    """Return what was done to which data; of `deepclust cluster`, which knows no method, how many clusters of what."""
    if "trust" not in results:
        return f"{results['method']} on {results['dataset']}"
    num_images, num_clusters = results["num_images"], results["num_clusters"]
    return f"{results['dataset']}: {count_of(num_images, 'image')} in {count_of(num_clusters, 'cluster')}"


def _render_name_tools(findings: Findings, clusters: Sequence[ClusterPictures]) -> str:
    """Return the HTML of the buttons by which edited names are saved, with the names of clusters that are not shown."""
    shown = {cluster.cluster for cluster in clusters}
    others = {str(cluster): name for cluster, name in findings.names.items() if cluster not in shown}
    return NAME_TOOLS.format(names=escape(json.dumps(others)))


def _get_final_values(results: Mapping) -> dict[str, float]:
    """Return the final scores and health by the names under which they are logged during training."""
    scores_by_rule = {rule: scores or {} for rule, scores in (results["scores"] or {}).items()}
    values = {f"eval/{rule}/{m}": value for rule, scores in scores_by_rule.items() for m, value in scores.items()}
    return values | {f"eval/{name}": float(value) for name, value in results["health"].items()}


def _render_run(results: Mapping, config_text: str) -> str:
    """Return the HTML of how the run was made: command, times, memory, versions and configuration."""
    timing = {
        key_to_words(key.removesuffix("_seconds")): _format_timing(key, value)
        for key, value in results["timing"].items()
        if value != 0
    }
    memory = results["peak_memory_bytes"]
    facts = {
        "method": results["method"],
        "network": results["backbone"],
        "seed": str(results["seed"]),
        "epochs": f"{results['epochs']:,}",
        **timing,
        "peak memory": None if memory is None else f"{memory / 2**30:.2f} GiB",
        "steps": f"{results['steps']:,}",
        "processes": str(results["world_size"]),
        "commit": results["commit"],
        **results["versions"],
    }
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value is not None
    )
    command = results["command"] if isinstance(results["command"], str) else shlex.join(results["command"])
    return (
        f"<pre>{escape(command)}</pre><dl>{rows}</dl>"
        f"<details><summary>Configuration</summary><pre>{escape(config_text)}</pre></details>"
    )


def _format_timing(key: str, value: float | None) -> str | None:
    """Return an entry of `timing` as text; as seconds, minutes or hours if the key ends in `_seconds`."""
    if value is None or not key.endswith("_seconds"):
        return None if value is None else format_number(value)
    if value < 60:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
