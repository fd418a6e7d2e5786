"""`deepclust evaluate run=DIR`: the scores of a finished run, made anew from its checkpoint."""

import json
import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from deepclust.config.build import build
from deepclust.datasets.image_sources import ImageSet
from deepclust.engine.devices import select_device
from deepclust.runs.assemble import build_datamodule, build_evaluator
from deepclust.runs.checkpoint import load_checkpoint, load_method
from deepclust.runs.results import read_results

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> dict[str, Any]:
    """Print scores and health of the run `cfg.run` as JSON, and return them."""
    run_cfg, method = load_method(load_checkpoint(Path(cfg.run)))
    if cfg.data_dir is not None:
        before, now = run_cfg.data_dir, cfg.data_dir
        for name, value in run_cfg.dataset.source.items():
            if isinstance(value, str) and value.startswith(before):
                run_cfg.dataset.source[name] = now + value.removeprefix(before)
    with redirect_stdout(sys.stderr):  # how far it is; standard output is for the JSON alone
        images: ImageSet = build(run_cfg.dataset.source)
        then, now = (read_results(Path(cfg.run)) or {}).get("num_images"), len(images.fit)
        if then is not None and then != now:
            log.warning("the run had %d images and there are %d now: the scores are those of other images", then, now)
        evaluator = build_evaluator(run_cfg, images)
        result = evaluator(method.to(select_device(cfg.accelerator)), build_datamodule(run_cfg, images))
    output = {"run": cfg.run, "scores": result.scores, "health": result.health}
    print(json.dumps(output, indent=2))
    return output
