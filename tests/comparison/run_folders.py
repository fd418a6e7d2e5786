"""Run folders made up for the tests of the comparison."""

import json
from pathlib import Path

from omegaconf import OmegaConf

from deepclust.comparison.table import Comparison, compare_runs

PUBLISHED = [
    {
        "method": "cc",
        "protocol": "merged",
        "backbone": "resnet34",
        "source": "the paper",
        "figures": {"digits": {"acc": 0.79, "nmi": 0.7, "spread": {"acc": 0.04}}, "mnist": {"acc": 0.5}},
    }
]
CC_SCORES = {"acc": [0.80, 0.90, 0.85], "nmi": [0.70, 0.70, 0.70], "ari": [0.60, 0.66, 0.63]}  # by seed


def write_run(folder: Path, *, overrides: list[str] | None = None, **changes: object) -> None:
    """Write the folder of a finished run of cc on digits, with changes to its results.json."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("seed: 0\n")
    OmegaConf.save(OmegaConf.create(overrides or []), folder / ".hydra" / "overrides.yaml")
    results = {
        "format": 1,
        "method": "cc",
        "dataset": "digits",
        "backbone": "conv_small",
        "seed": 0,
        "num_clusters": 10,
        "epochs": 5,
        "scores": {"method": None, "kmeans": {"acc": 0.5, "nmi": 0.5, "ari": 0.5}},
        "timing": {"train_seconds": 60.0},
    }
    (folder / "results.json").write_text(json.dumps({**results, **changes}))


def write_example_runs(folder: Path) -> None:
    """Write three seeds of cc and of propos at different depths, a run that was stopped and one that has failed."""
    for seed in range(3):
        write_run(
            folder / "multirun" / "day" / str(seed),
            overrides=["method=cc", f"seed={seed}"],
            seed=seed,
            scores={
                "method": {metric: values[seed] for metric, values in CC_SCORES.items()},
                "kmeans": {"acc": 0.4, "nmi": 0.4, "ari": 0.4},
            },
            timing={"train_seconds": 60.0 * (seed + 1)},
        )
        write_run(folder / "outputs" / str(seed), overrides=["method=propos"], method="propos", seed=seed)
    for name in ("stopped", "failed"):
        (folder / name / ".hydra").mkdir(parents=True)
        (folder / name / ".hydra" / "config.yaml").touch()
    (folder / "failed" / "error.txt").write_text("Traceback\n  line 3\nRuntimeError: out of memory\n")
    (folder / "failed" / "status.json").write_text('{\n "status": "failed"\n}')


def compare(folder: Path, *, published: list[dict] | None = None) -> Comparison:
    """Compare the runs below a folder as `deepclust compare` does, without published figures unless given."""
    return compare_runs(folder, published=published or [], ignore=["seed", "data_dir", "logger"])
