"""results.json: what a finished run was, scored and cost, and how it is put together, written and read."""

import json
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
from deepclust.engine.output_files import write_text
from deepclust.engine.small_files import dict_or_empty, is_finite_number, read_state
from deepclust.runs.objective import compute_objective
from deepclust.runs.provenance import read_command_line, read_commit, read_versions
from deepclust.runs.run_folder import EARLIER_RESULTS, ERROR, RESULTS
from deepclust.score_names import SCORE_NAMES

# What commands read of a results.json, and its type; float is any finite number.
REQUIRED_RESULTS: dict[str, type] = {
    **dict.fromkeys(("method", "dataset"), str),
    **dict.fromkeys(("seed", "num_images", "num_clusters", "steps"), int),
    **dict.fromkeys(("scores", "health", "timing"), dict),
    **dict.fromkeys(("timing.train_seconds", "timing.images_per_second"), float),
    **dict.fromkeys(("health.empty_clusters", "health.cluster_size_entropy"), float),
}


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
        "dataset": name_dataset(cfg.dataset),
        "backbone": cfg.names.backbone,
        "seed": cfg.seed,
        "num_images": len(images.fit),
        "num_clusters": evaluation.num_clusters,
        "num_classes": cfg.dataset.num_classes if images.labels is not None else None,
        "scores": evaluation.scores,
        "ami": evaluation.ami,
        "smallest_classes_recall": evaluation.smallest_classes_recall,
        "health": evaluation.health,
        "epochs": trainer.current_epoch,
        "max_epochs": trainer.max_epochs,
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
            "images_per_second": count_batches_done(trainer) * cfg.batch_size / train_seconds,
            "e_step_seconds": e_step_seconds,
            "evaluate_seconds": evaluate_seconds,
        },
        "peak_memory_bytes": measure_peak_memory(),
    }
    if evaluation.tree is not None:
        results["tree"] = evaluation.tree.summarize() | {"dendrogram_purity": evaluation.dendrogram_purity}
    if cfg.get("objective") is not None:
        results["objective"] = compute_objective(
            cfg.objective, evaluation.features, evaluation.assignments, seed=cfg.seed
        )
    if pixel_scores is not None:
        results["baseline"] = {"kmeans_on_pixels": pixel_scores}
    if estimate is not None:
        results["number"] = describe_estimate(estimate)
    return results


def name_dataset(dataset: DictConfig) -> str:
    """Return the name of a data set; a long-tailed variant has one of its own, for its scores are not to be mixed."""
    imbalance = dataset.get("imbalance")
    return dataset.name if imbalance is None else f"{dataset.name}, imbalance {imbalance:g}"


def count_batches_done(trainer: Trainer) -> int:
    """Return how many batches were trained on, of which a step accumulates several if it is told to."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.completed


def describe_estimate(estimate: ClusterNumberEstimate) -> dict[str, Any]:
    """Return what results.json says of an estimated number of clusters."""
    return asdict(estimate) | {
        "message": estimate.summarize(),
        "is_sure": estimate.is_sure,
        "candidates": [asdict(candidate) for candidate in estimate.candidates],
        "doubt": estimate.describe_doubt(),
    }


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json atomically: its presence means that the run is complete."""
    write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    forget_results_set_aside(folder)
    (folder / ERROR).unlink(missing_ok=True)  # of an earlier start


def read_results(folder: Path) -> dict[str, Any] | None:
    """Read results.json of a finished run; None if there is none.

    Raises:
        InputError: if something else is in its place.
    """
    return read_state(folder / RESULTS, check_results, expected="the results of a finished run")


def read_latest_results(folder: Path) -> dict[str, Any] | None:
    """Read results.json of a run, or that of earlier clusters which was set aside; None if there is neither.

    Raises:
        InputError: if something else is in its place.
    """
    earlier = "the results of earlier clusters"
    return read_results(folder) or read_state(folder / EARLIER_RESULTS, check_results, expected=earlier)


def set_results_aside(folder: Path) -> None:
    """Take results.json away before other clusters are written into its folder.

    Until they are complete, the folder holds no result: some of its files are of these clusters, some of the earlier
    ones. A second start finds what has been set aside with `read_latest_results`.
    """
    if (folder / RESULTS).exists():
        (folder / RESULTS).replace(folder / EARLIER_RESULTS)


def forget_results_set_aside(folder: Path) -> None:
    """Remove what `set_results_aside` has kept."""
    (folder / EARLIER_RESULTS).unlink(missing_ok=True)


def check_results(results: Any) -> str | None:
    """Return what is wrong with the content of a results.json as far as commands read it; None if nothing is."""
    if not isinstance(results, dict):
        return f"it holds a {type(results).__name__}, no object"
    if results.get("format") != 1:
        return f"its format is {str(results.get('format'))[:40]}, not 1"
    for key, kind in REQUIRED_RESULTS.items():
        value: Any = results
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        is_as_expected = is_finite_number(value) if kind is float else isinstance(value, kind)
        if not is_as_expected or isinstance(value, bool):
            return f"{key} is {str(value)[:40]}"
    rules = [*results["scores"].items(), *dict_or_empty(results.get("baseline")).items()]
    for rule, scores in rules:
        is_complete = isinstance(scores, dict) and scores.keys() >= set(SCORE_NAMES)
        if scores is not None and not (is_complete and all(map(is_finite_number, scores.values()))):
            return f"scores.{rule} is {str(scores)[:40]}"
    trust = results.get("trust", {"message": ""})  # with `unreadable`, of `deepclust cluster` only
    if not isinstance(trust, dict) or not isinstance(trust.get("message"), str):
        return f"trust is {str(trust)[:40]}"
    for entry in results.get("unreadable", ()) if isinstance(results.get("unreadable", []), list) else [None]:
        if not isinstance(entry, list) or list(map(type, entry)) != [int, str, str]:
            return f"unreadable holds {str(entry)[:40]}"
    return None


def measure_peak_memory() -> int:
    """Return the most bytes in use so far: of the device on a GPU, of the process otherwise."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()  # counts CUDA graphs too, which allocate nothing
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
