"""The model card of a shared run: README.md with a header that the Hugging Face Hub reads."""

from typing import Any

import yaml

from deepclust.engine.plurals import format_count
from deepclust.runs.run_folder import HUB_WEIGHTS

HUB_METRICS = {"acc": "accuracy", "nmi": "nmi", "ari": "ari"}  # the Hub's names of our scores
RULES = {"method": "the method's own rule", "kmeans": "k-means on the features"}
CARD = """\
---
{header}---

# {title}

Clusters by `{method}`, trained without labels on `{dataset}` with deepclust. The model takes {takes} and gives one of
{num_clusters} clusters with a confidence. Clusters are numbered in no particular order.
{warning}
## Use

With deepclust and its extra `hub` installed:

    deepclust predict run=hf://OWNER/NAME images=FOLDER output=clusters.csv

or from Python

```python
import deepclust

run = deepclust.load_run("hf://OWNER/NAME")
clusters = run.predict("FOLDER")
```

OWNER/NAME is the name of this model; the folder that it was downloaded to does as well. A run of unknown origin runs no
code of its own: deepclust builds what its own configurations use, and nothing else unless `trust=PACKAGE` says so.

## Scores

{scores}

## Training

| | |
|---|---|
{facts}
"""


def compose_model_card(
    config: dict[str, Any], results: dict[str, Any] | None, *, license: str | None, dataset_license: str | None
) -> str:
    """Return the text of the card of a run with the resolved configuration `config`.

    `license` is that of the model and `dataset_license` that of the images, both None where they are not known.
    """
    results = results or {}
    dataset, names = config["dataset"], config["names"]
    is_on_images = dataset["channels"] in (1, 3)
    warning = (
        ""
        if dataset_license
        else f"\n> **Warning:** the licence of the data set `{dataset.get('name')}` is unknown. Find out whether it "
        "allows to share a model that was trained on it, and how the model may be used.\n"
    )
    return CARD.format(
        header=yaml.safe_dump(compose_header(config, results, license), sort_keys=False, allow_unicode=True),
        title=f"{names['method']} on {dataset.get('name')}",
        method=names["method"],
        dataset=dataset.get("name"),
        takes="images" if is_on_images else f"vectors of {dataset['channels']} numbers",
        num_clusters=results.get("num_clusters", dataset["num_clusters"]),
        warning=warning,
        scores=format_scores(results),
        facts="\n".join(f"| {name} | {value} |" for name, value in list_facts(config, results, dataset_license)),
    )


def compose_header(config: dict[str, Any], results: dict[str, Any], license: str | None) -> dict[str, Any]:
    """Return the header of the card, for the Hub's search."""
    method, dataset = config["names"]["method"], config["dataset"].get("name")
    header: dict[str, Any] = {
        "library_name": "deepclust",
        "tags": ["deepclust", "image-clustering", "deep-clustering", "unsupervised", str(method)],
        "datasets": [str(dataset)],
        "metrics": list(HUB_METRICS.values()),
    }
    if license:
        header["license"] = license
    scores = [
        {"type": HUB_METRICS[name], "name": f"{name.upper()} ({RULES.get(rule, rule)})", "value": value}
        for rule, by_name in (results.get("scores") or {}).items()
        for name, value in (by_name or {}).items()
        if name in HUB_METRICS
    ]
    if scores:
        task = {"type": "image-clustering", "name": "Image clustering"}
        result = {"task": task, "dataset": {"type": str(dataset), "name": str(dataset)}, "metrics": scores}
        header["model-index"] = [{"name": f"{method} on {dataset}", "results": [result]}]
    return header


def format_scores(results: dict[str, Any]) -> str:
    """Return the scores as a table, or what to say where there are none."""
    rows = [
        f"| {RULES.get(rule, rule)} | " + " | ".join(f"{scores[name]:.4f}" for name in HUB_METRICS) + " |"
        for rule, scores in (results.get("scores") or {}).items()
        if scores
    ]
    if not rows:
        return "None: the images have no labels to compare with."
    head = "| assignment | ACC | NMI | ARI |\n|---|---|---|---|"
    note = "Fractions. ACC uses the best one-to-one matching of clusters and classes. Labels were used for this only."
    return "\n".join([head, *rows, "", note])


def list_facts(config: dict[str, Any], results: dict[str, Any], dataset_license: str | None) -> list[tuple[str, str]]:
    """Return (name, value) of what made the model."""
    versions = results.get("versions") or {}
    num_images = results.get("num_images") or config["dataset"].get("num_images")
    return [
        ("method", f"`{config['names']['method']}`"),
        ("backbone", f"`{config['names'].get('backbone')}`"),
        ("data set", f"`{config['dataset'].get('name')}`, {format_count(num_images, 'image')}"),
        ("licence of the data set", dataset_license or "unknown"),
        ("clusters", str(results.get("num_clusters", config["dataset"]["num_clusters"]))),
        ("epochs", str(results.get("epochs", config["trainer"].get("max_epochs")))),
        ("seed", str(config["seed"])),
        ("commit of deepclust", str(results.get("commit") or "unknown")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown"),
        ("weights", f"`{HUB_WEIGHTS}`"),
    ]
