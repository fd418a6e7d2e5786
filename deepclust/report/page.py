"""report.html: one file that opens without a network: scores, clusters as pictures, plots, how it was run."""

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from deepclust.report.cluster_pictures import Sheet, clusters
from deepclust.report.curves import curves as draw_curves
from deepclust.report.curves import number_of_clusters
from deepclust.report.embedding_map import EmbeddingMap
from deepclust.report.heatmap import heat_map
from deepclust.report.html_fragments import line, number, words
from deepclust.report.map_script import SCRIPT
from deepclust.report.scatter_plot import scatter
from deepclust.report.style_sheet import STYLE

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
<header><h1>{title}</h1>{head}<nav>{links}</nav></header>
{sections}
{script}
</body>
</html>
"""


def write_report(
    path: Path,
    *,
    results: Mapping,
    sheets: Sequence[Sheet],
    embedding: EmbeddingMap | None,
    table: np.ndarray | None,
    class_names: Sequence[str] | None,
    curves: Path | None,
    config_text: str,
) -> None:
    """Write the page to `path`.

    results: the content of results.json. table: counts (C, K) of classes in clusters. curves: a CSV file with
    a column `step` and one a scalar, empty where nothing was logged. What is None or missing is left out.
    """
    num_full = int(results["num_clusters"] - results["health"]["empty_clusters"])
    parts = {
        "Clusters": clusters(sheets, num_full=num_full),
        "Map": scatter(embedding, table, class_names),
        "Classes": heat_map(table, class_names),
        "Number": number_of_clusters(results.get("number")),
        "Curves": draw_curves(
            curves, rules=RULES, final=_judged(results), steps=results["steps"], epochs=results["epochs"]
        ),
        "Run": _run(results, config_text),
    }
    shown = {name: body for name, body in parts.items() if body}
    script = SCRIPT if "Map" in shown else ""
    page = PAGE.format(
        policy=_policy(script),
        title=escape(f"{results['method']} on {results['dataset']}"),
        style=STYLE,
        head=_head(results, sheets),
        links=" ".join(f'<a href="#{name}">{name}</a>' for name in shown),
        sections="\n".join(f'<section id="{name}"><h2>{name}</h2>{body}</section>' for name, body in shown.items()),
        script=f"<script>{script}</script>" if script else "",
    )
    path.write_text(page, encoding="utf-8", errors="replace")  # a file's name may be no valid text


def _policy(script: str) -> str:
    """By which the browser itself keeps the page from loading anything, and from running any script but ours."""
    said = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        said += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    return said


def _head(results: Mapping, sheets: Sequence[Sheet]) -> str:
    """What was clustered, and the scores with what they mean; without labels, what can still be said."""
    images, num_clusters, epochs = (f"{results[key]:,}" for key in ("num_images", "num_clusters", "epochs"))
    facts = [f"{images} images", f"{num_clusters} clusters", results["backbone"], f"{epochs} epochs"]
    facts.append(f"seed {results['seed']}")
    health = dict(results["health"])
    scored = {**(results["scores"] or {}), **(results.get("baseline") or {})}
    known = [(name, s) for rule, name in RULES.items() if (s := scored.get(rule))]
    if known:
        (rule, scores), *others = known
        tiles = [(f"{100 * scores[m]:.1f}", m.upper(), meaning) for m, meaning in METRICS.items()]
        below = [[f"in percent, for {rule}"]]
        below += [[name, *(f"{m.upper()} {100 * s[m]:.1f}" for m in METRICS)] for name, s in others]
    else:
        evenness, empty = f"{100 * health.pop('cluster_size_entropy'):.1f}", int(health.pop("empty_clusters"))
        tiles = [
            (evenness, "evenness", "of the cluster sizes in percent; 100 is all of one size, 0 all in one cluster"),
            (number(empty), "empty", f"of the {num_clusters} clusters; these hold no image"),
        ]
        if sheets:
            share = f"{100 * sheets[0]['share']:.1f}"
            tiles.append((share, "largest", "percent of the images are in the largest cluster"))
        below = [["without labels nothing can be said about right or wrong"]]
    if "trust" in results:
        below.append([results["trust"]["message"]])
    if health:
        below.append([f"{words(key)} {number(value)}" for key, value in health.items()])
    cards = "".join(f"<div><b>{value}</b> {name}<p>{meaning}</p></div>" for value, name, meaning in tiles)
    return f'{line(facts)}<div class="tiles">{cards}</div>{"".join(map(line, below))}'


def _judged(results: Mapping) -> dict[str, float]:
    """Final scores and health by the names that their curves have."""
    scores = {f"eval/{rule}/{m}": v for rule, s in (results["scores"] or {}).items() for m, v in (s or {}).items()}
    return scores | {f"eval/{name}": float(value) for name, value in results["health"].items()}


def _run(results: Mapping, config_text: str) -> str:
    timing = {words(k.removesuffix("_seconds")): _timing(k, v) for k, v in results["timing"].items() if v != 0}
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
        return None if value is None else number(value)
    if value < 60:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
