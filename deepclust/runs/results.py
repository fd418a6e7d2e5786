"""results.json: what a finished run was, scored and cost, and how it is put together, written and read."""

import json
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from omegaconf import DictConfig

from deepclust.callbacks.evaluation import EvaluationResult
from deepclust.clustering.number_of_clusters import ClusterNumberEstimate
from deepclust.datasets.image_sources import ImageSet
from deepclust.runs.folder import ERROR, RESULTS
from deepclust.runs.provenance import read_command_line, read_commit, read_versions


def compose_results(
    cfg: DictConfig,
    images: ImageSet,
    trainer: Trainer,
    evaluation: EvaluationResult,
    *,
    train_seconds: float,
    e_step_seconds: float,
    evaluate_seconds: float,
    pixel_scores: dict[str, float] | None,
    estimate: ClusterNumberEstimate | None,
) -> dict[str, Any]:
    """Return the content of results.json for a run that has been trained and evaluated.

    `pixel_scores` are those of k-means on pixels; `estimate` is that of the number of clusters, where it was asked for.
    """
    results: dict[str, Any] = {
        "format": 1,
        "method": cfg.names.method,
        "dataset": cfg.dataset.name,
        "backbone": cfg.names.backbone,
        "seed": cfg.seed,
        "num_images": len(images.fit),
        "num_clusters": cfg.dataset.num_clusters,
        "num_classes": cfg.dataset.num_classes if images.labels is not None else None,
        "scores": evaluation.scores,
        "health": evaluation.health,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "world_size": trainer.world_size,
        "command": read_command_line(),
        "overrides": list(cfg.overrides or []),
        "versions": read_versions(),
        "commit": read_commit(),
        "earlier": {name: cfg.earlier[name] for name in ("run", "sha256")},
        "timing": {
            "train_seconds": train_seconds,
            "earlier_seconds": cfg.earlier.train_seconds,
            "images_per_second": trainer.global_step * cfg.batch_size / train_seconds,
            "e_step_seconds": e_step_seconds,
            "evaluate_seconds": evaluate_seconds,
        },
        "peak_memory_bytes": measure_peak_memory(),
    }
    if pixel_scores is not None:
        results["baseline"] = {"kmeans_on_pixels": pixel_scores}
    if estimate is not None:
        results["number"] = describe_estimate(estimate)
    return results


def describe_estimate(estimate: ClusterNumberEstimate) -> dict[str, Any]:
    """Return what results.json says of an estimated number of clusters."""
    return asdict(estimate) | {"message": estimate.summarize()}


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json atomically: its presence means that the run is complete."""
    temporary = folder / f"{RESULTS}.writing"
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, folder / RESULTS)
    (folder / ERROR).unlink(missing_ok=True)  # of an earlier start


def read_results(folder: Path) -> dict[str, Any] | None:
    """Read results.json of a finished run; None if there is none."""
    path = folder / RESULTS
    return json.loads(path.read_text()) if path.exists() else None


def measure_peak_memory() -> int:
    """Return the most bytes in use so far: of the device on a GPU, of the process otherwise."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()  # counts CUDA graphs too, which allocate nothing
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
