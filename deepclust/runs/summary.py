"""The summary of a finished run on the terminal: its scores, health and time, and where its files lie."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deepclust.runs.folder import ASSIGNMENTS, REPORT, RESULTS

RULES = {
    "pixels": "k-means on pixels",
    "method": "the method's own rule",
    "kmeans": "k-means on its features",
}


def print_summary(results: dict[str, Any], folder: Path) -> None:
    """Print the scores of a run and where its files lie."""
    table = Table(title=f"{results['method']} on {results['dataset']}, seed {results['seed']}", title_justify="left")
    for column in ("", "ACC", "NMI", "ARI"):
        table.add_column(column, justify="left" if not column else "right")
    scores = {"pixels": results.get("baseline", {}).get("kmeans_on_pixels"), **results["scores"]}
    for rule, title in RULES.items():
        if scores.get(rule):
            table.add_row(title, *(f"{scores[rule][name]:.3f}" for name in ("acc", "nmi", "ari")))
    console = Console()
    if table.row_count:
        console.print(table)
    health, timing = results["health"], results["timing"]
    earlier = timing.get("earlier_seconds", 0.0)
    trained = f"trained {(timing['train_seconds'] + earlier) / 60:.1f} min"
    trained += f", {earlier / 60:.1f} of them before its last stage" if earlier else ""
    console.print(
        f"clusters: {results['num_clusters']}, {health['empty_clusters']:.0f} empty, "
        f"evenness {health['cluster_size_entropy']:.3f} of 1; "
        + trained
        + (f", {timing['images_per_second']:.0f} images/s" if results["steps"] else "")
    )
    for what, name in (("pictures", REPORT), ("clusters", ASSIGNMENTS), ("scores", RESULTS)):
        console.print(f"{what}: {folder / name}", soft_wrap=True, highlight=False)
