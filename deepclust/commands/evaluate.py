"""`deepclust evaluate run=DIR`: the scores of a finished run, computed anew from its checkpoint."""

import json
import logging
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig

from deepclust.clustering.backend import EXACT, clustering_settings
from deepclust.engine.devices import select_device
from deepclust.runs.assemble import build_datamodule, build_evaluator
from deepclust.runs.checkpoint import load_checkpoint, load_method
from deepclust.runs.locate_run import locate_run
from deepclust.runs.open_dataset import open_dataset
from deepclust.runs.results import read_results
from deepclust.runs.trusted_targets import split_trust

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> dict[str, Any]:
    """Print scores and health of the run `cfg.run` as JSON, and return them."""
    run = locate_run(cfg.run)
    run_cfg, method = load_method(load_checkpoint(run), trust=split_trust(cfg.trust))
    if cfg.data_dir is not None:
        move_data_dir(run_cfg, cfg.data_dir)
    with redirect_stdout(sys.stderr):  # for the progress: standard output is for the JSON alone
        images = open_dataset(run_cfg.dataset)
        num_then, num_now = (read_results(run) or {}).get("num_images"), len(images.fit)
        if num_then is not None and num_then != num_now:
            log.warning(
                "the run had %d images and there are %d now: the scores are those of other images", num_then, num_now
            )
        evaluator = build_evaluator(run_cfg, images)
        # Those of the run, so that its k-means finds the same clusters; a run from before these keys has none.
        with clustering_settings(**(asdict(EXACT) | dict(run_cfg.get("clustering") or {}))):
            result = evaluator(method.to(select_device(cfg.accelerator)), build_datamodule(run_cfg, images))
    more_scores = {"ami": result.ami, "smallest_classes_recall": result.smallest_classes_recall}
    output = {"run": cfg.run, "scores": result.scores, **more_scores, "health": result.health}
    print(json.dumps(output, indent=2))
    return output


def move_data_dir(run_cfg: DictConfig, data_dir: str) -> None:
    """Let every path below the data folder that a run had point below `data_dir`."""
    old_data_dir = run_cfg.data_dir
    for name, value in run_cfg.dataset.source.items():
        if isinstance(value, str) and value.startswith(old_data_dir):
            run_cfg.dataset.source[name] = data_dir + value.removeprefix(old_data_dir)
