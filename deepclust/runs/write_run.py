"""The end of a run: assignments, report, results.json and dashboards are written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from deepclust.callbacks.evaluation import EvaluationResult
from deepclust.datasets.image_sources import ImageSet
from deepclust.report.run_report import write_run_report
from deepclust.runs.assignments_csv import write_assignments
from deepclust.runs.dashboards import send_to_dashboards
from deepclust.runs.results import write_results


def write_run(
    folder: Path,
    results: dict[str, Any],
    evaluation: EvaluationResult,
    images: ImageSet,
    cfg: DictConfig,
    *,
    loggers: Sequence[Logger] = (),
) -> None:
    """Write what a finished run leaves behind, results.json last, then the end of the run to its dashboards."""
    write_assignments(folder, evaluation.assignments, evaluation.confidence, labels=images.labels, paths=images.paths)
    pictures = write_run_report(
        folder,
        results,
        evaluation,
        images,
        seed=cfg.seed,
        per_cluster=cfg.report.per_cluster,
        map_points=cfg.report.map_points,
        config_text=OmegaConf.to_yaml(cfg, resolve=True),
    )
    write_results(folder, results)
    table = None if evaluation.contingency_table is None else evaluation.contingency_table.numpy()
    send_to_dashboards(loggers, results, pictures, table, images.class_names)
