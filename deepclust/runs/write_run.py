"""The end of a run: assignments, report, results.json and dashboards are written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from deepclust.callbacks.evaluation import EvaluationResult
from deepclust.clustering.cluster_tree import ClusterTree
from deepclust.datasets.image_sources import ImageSet
from deepclust.engine.output_files import replace_file
from deepclust.engine.progress_bar import announce
from deepclust.report.findings import Findings
from deepclust.report.run_report import write_run_report
from deepclust.report.shown_paths import hide_places
from deepclust.runs.assignments_csv import write_assignments
from deepclust.runs.dashboards import send_to_dashboards
from deepclust.runs.results import write_results
from deepclust.runs.run_folder import TREE


def write_run(
    folder: Path,
    results: dict[str, Any],
    evaluation: EvaluationResult,
    images: ImageSet,
    cfg: DictConfig,
    *,
    loggers: Sequence[Logger] = (),
    findings: Findings | None = None,
) -> None:
    """Write what a finished run leaves behind, results.json last, then the end of the run to its dashboards.

    `findings` are what `deepclust cluster` has found beside the clusters.
    """
    more_columns = {} if findings is None else findings.list_columns(len(evaluation.assignments))
    write_assignments(
        folder,
        evaluation.assignments,
        evaluation.confidence,
        labels=images.labels,
        paths=images.paths,
        more_columns=more_columns,
    )
    if evaluation.tree is not None:
        write_tree(folder, evaluation.tree)
    config = OmegaConf.to_container(cfg, resolve=True)
    absolute_paths = cfg.report.paths == "absolute"
    shown_config = config if absolute_paths else hide_places(config, folder)
    with announce("pictures and map of the report"):
        pictures = write_run_report(
            folder,
            results,
            evaluation,
            images,
            seed=cfg.seed,
            per_cluster=cfg.report.per_cluster,
            map_points=cfg.report.map_points,
            config_text=yaml.dump(shown_config, sort_keys=False, allow_unicode=True),
            absolute_paths=absolute_paths,
            findings=findings,
        )
    write_results(folder, results)
    table = None if evaluation.contingency_table is None else evaluation.contingency_table.numpy()
    send_to_dashboards(loggers, results, pictures, table, images.class_names, samples=evaluation.samples)


def write_tree(folder: Path, tree: ClusterTree) -> None:
    """Write tree.npz: partitions (R, M) of the images of the fit set, thresholds (R,) and counts (R + 1,)."""
    with replace_file(folder / TREE) as new, new.open("wb") as file:
        np.savez(file, partitions=tree.partitions, thresholds=tree.thresholds, counts=tree.counts)
