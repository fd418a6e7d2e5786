"""The summary of a finished run on the terminal: its scores, health and time, and where its files are."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deepclust.runs.run_folder import ASSIGNMENTS, REPORT, RESULTS
from deepclust.score_names import SCORE_NAMES

RULE_TITLES = {
    "pixels": "k-means on pixels",
    "method": "the method's own rule",
    "kmeans": "k-means on its features",
}


def print_summary(results: dict[str, Any], folder: Path) -> None:
    """Print the scores of a run and where its files are."""
    title = f"{results['method']} on {results['dataset']}, seed {results['seed']}; scores in percent"
    table = Table(title=title, title_justify="left")
    for column in ("", "ACC", "NMI", "ARI"):
        table.add_column(column, justify="left" if not column else "right")
    scores_by_rule = {"pixels": results.get("baseline", {}).get("kmeans_on_pixels"), **results["scores"]}
    for rule, title in RULE_TITLES.items():
        if scores := scores_by_rule.get(rule):
            table.add_row(title, *(f"{100 * scores[metric]:.1f}" for metric in SCORE_NAMES))
    console = Console()
    if table.row_count:
        console.print(table)
    health, timing = results["health"], results["timing"]
    earlier_seconds = timing.get("earlier_seconds", 0.0)
    training_time = f"trained {(timing['train_seconds'] + earlier_seconds) / 60:.1f} min"
    training_time += f", {earlier_seconds / 60:.1f} of them in earlier stages" if earlier_seconds else ""
    console.print(
        f"clusters: {results['num_clusters']}, {health['empty_clusters']:.0f} empty, "
        f"evenness {100 * health['cluster_size_entropy']:.1f} %; "
        + training_time
        + (f", {timing['images_per_second']:.0f} images/s" if results["steps"] else "")
    )
    for content, file_name in (("pictures", REPORT), ("clusters", ASSIGNMENTS), ("scores", RESULTS)):
        console.print(f"{content}: {folder / file_name}", soft_wrap=True, highlight=False)
