"""`deepclust evaluate run=DIR`: the scores of a finished run, made anew from its checkpoint."""

import json
import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from deepclust.config import build
from deepclust.datasets.source import ImageSet
from deepclust.run_folder import load_checkpoint, load_method, pick_device, read_results
from deepclust.train import make_datamodule, make_judge

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
        judge = make_judge(run_cfg, images)
        judgement = judge(method.to(pick_device(cfg.accelerator)), make_datamodule(run_cfg, images))
    said = {"run": cfg.run, "scores": judgement.scores, "health": judgement.health}
    print(json.dumps(said, indent=2))
    return said
