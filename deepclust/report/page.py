"""The page report.html: scores, clusters as pictures, plots and how the run was made, all in one file."""

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from deepclust.engine.output_files import write_bytes
from deepclust.report.cluster_pictures import ClusterPictures, render_clusters
from deepclust.report.curves import render_curves, render_number_of_clusters
from deepclust.report.embedding_map import EmbeddingMap
from deepclust.report.heatmap import render_heat_map
from deepclust.report.html_fragments import format_number, key_to_words, render_note
from deepclust.report.map_script import SCRIPT
from deepclust.report.scatter_plot import render_scatter_plot
from deepclust.report.style_sheet import STYLE

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
HEADINGS = {"Number": "Number of clusters"}  # of sections whose headings are not their names
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>{header}<nav>{links}</nav></header>
{sections}
{script}
</body>
</html>
"""


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
) -> None:
    """Write the page to `path`. A section without content is left out.

    results: the content of results.json.
    contingency_table: counts (C, K) of the images of each class in each cluster.
    metrics_file: CSV with a column `step` and one for each scalar, with empty cells where it was not logged.
    """
    num_nonempty = int(results["num_clusters"] - results["health"]["empty_clusters"])
    sections = {
        "Clusters": render_clusters(clusters, num_nonempty=num_nonempty),
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
    shown = {name: content for name, content in sections.items() if content}
    script = SCRIPT if "Map" in shown else ""
    page = PAGE.format(
        policy=_make_security_policy(script),
        title=escape(f"{results['method']} on {results['dataset']}"),
        style=STYLE,
        header=_render_header(results, clusters),
        links=" ".join(f'<a href="#{name}">{name}</a>' for name in shown),
        sections="\n".join(
            f'<section id="{name}"><h2>{HEADINGS.get(name, name)}</h2>{content}</section>'
            for name, content in shown.items()
        ),
        script=f"<script>{script}</script>" if script else "",
    )
    write_bytes(path, page.encode("utf-8", errors="replace"))  # a file name may not be valid text


def _make_security_policy(script: str) -> str:
    """Return the policy by which the browser loads nothing from elsewhere and runs no script but the given one."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{script_hash}'"
    return policy


def _render_header(results: Mapping, clusters: Sequence[ClusterPictures]) -> str:
    """Return the HTML of what was clustered and of the scores; without labels, of the sizes of the clusters."""
    num_images, num_clusters, epochs = (f"{results[key]:,}" for key in ("num_images", "num_clusters", "epochs"))
    facts = [f"{num_images} images", f"{num_clusters} clusters", results["backbone"], f"{epochs} epochs"]
    facts.append(f"seed {results['seed']}")
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
    if "trust" in results:
        notes.append([results["trust"]["message"]])
    if health:
        notes.append([f"{key_to_words(key)} {format_number(value)}" for key, value in health.items()])
    cards = "".join(f"<div><b>{value}</b> {name}<p>{meaning}</p></div>" for value, name, meaning in tiles)
    return f'{render_note(facts)}<div class="tiles">{cards}</div>{"".join(map(render_note, notes))}'


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
