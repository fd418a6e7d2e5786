"""`deepclust train`: from a configuration to a finished run folder, the story on one page."""

import copy
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import Trainer
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig, OmegaConf

from deepclust import distributed, launch
from deepclust.callbacks.checkpoint import LastCheckpoint
from deepclust.callbacks.evaluation import Judge, Judgement
from deepclust.config import build, plain
from deepclust.datasets.datamodule import ImageDataModule
from deepclust.datasets.source import ImageSet
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.run_folder import (
    ASSIGNMENTS,
    CHECKPOINT,
    check_same_recipe,
    command_line,
    commit,
    load_checkpoint,
    peak_memory_bytes,
    read_results,
    versions,
    write_assignments,
    write_results,
)
from deepclust.show import judge_pixels, show_run, write_run_report

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> dict[str, Any]:
    """One run in Hydra's folder; a finished one is shown and left alone."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if (results := read_results(folder)) is not None:
        log.info("%s is finished already; nothing to do", folder)
    else:
        choices = HydraConfig.get().runtime.choices  # known in this process only
        cfg.names = {"method": choices["method"], "backbone": choices["backbone"]}
        results = launch.run(train, cfg, folder)
    show_run(results, folder)
    return results


def train(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Fit, cluster, score, write the run folder; the content of results.json. Runs on every process of the run."""
    quiet_lightning()
    images: ImageSet = build(cfg.dataset.source)
    check_dataset(cfg, images)
    datamodule = make_datamodule(cfg, images)
    torch.manual_seed(cfg.seed)  # initial weights; every later draw has its own key
    method: ClusteringMethod = build(cfg.method)
    if cfg.hardware.channels_last:
        method.to(memory_format=torch.channels_last)
    if cfg.sync_batchnorm:
        distributed.synchronise_batch_norm(method)

    judge = make_judge(cfg, images)
    config = plain(cfg)
    resumed = (folder / CHECKPOINT).exists()
    if resumed:
        check_same_recipe(load_checkpoint(folder), config)
    at_hand = {"folder": folder, "judge": judge, "config": config}
    callbacks = build_each(cfg.callbacks, at_hand)
    trainer: Trainer = build(
        cfg.trainer,
        callbacks=callbacks,
        logger=build_each(cfg.logger, at_hand),
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
    )

    started = time.monotonic()
    try:
        trainer.fit(method, datamodule, ckpt_path=str(folder / CHECKPOINT) if resumed else None)
    except SystemExit:
        if trainer.interrupted:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        raise
    train_seconds = time.monotonic() - started

    # Lightning has moved the network to the CPU. The labels made before the last epoch lag the weights: renew them.
    method.to(trainer.strategy.root_device)
    method.renew(trainer.current_epoch)
    started = time.monotonic()
    judgement = judge(method, datamodule)
    evaluate_seconds = time.monotonic() - started
    for callback in callbacks:
        if isinstance(callback, LastCheckpoint):
            train_seconds += callback.seconds_before
            callback.save(trainer, method, **judgement.rule)

    results = describe(cfg, images, trainer, judgement) | {
        "timing": {
            "train_seconds": train_seconds,
            "images_per_second": trainer.global_step * cfg.batch_size / train_seconds,
            "e_step_seconds": method.e_step_seconds,
            "evaluate_seconds": evaluate_seconds,
        },
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if (pixels := judge_pixels(images, judge, max_values=cfg.pixel_baseline_max_values)) is not None:
        results["baseline"] = {"kmeans_on_pixels": pixels}
    if trainer.is_global_zero:
        write_assignments(
            folder / ASSIGNMENTS,
            judgement.assignments,
            judgement.confidence,
            labels=images.labels,
            paths=images.paths,
        )
        write_run_report(folder, results, judgement, images, cfg)
        write_results(folder, results)
    return results


def check_dataset(cfg: DictConfig, images: ImageSet) -> None:
    """Hold the configuration against the images, and write what it left open into it.

    Raises:
        InputError: naming the key to change.
    """
    height, _, channels = images.fit.shape
    found = {"num_images": len(images.fit), "channels": channels}
    if cfg.dataset.image_size is None:
        found["image_size"] = height
    if cfg.dataset.num_classes is None and images.labels is not None:
        found["num_classes"] = len(images.class_names) if images.class_names else int(images.labels.max()) + 1
    for key, value in found.items():
        said = cfg.dataset.get(key)
        if said is not None and said != value:
            raise InputError(
                f"dataset.{key} is {said} and the images of {cfg.dataset.name} have {value}",
                expected="the same number",
                do=f"set dataset.{key}={value}",
            )
        cfg.dataset[key] = value
    if not isinstance(cfg.dataset.num_clusters, int):
        raise InputError(
            f"dataset.num_clusters is {cfg.dataset.num_clusters}",
            expected="the number of clusters to find",
            do="set dataset.num_clusters=K",
        )
    if not 1 <= cfg.dataset.num_clusters <= len(images.fit):
        raise InputError(
            f"dataset.num_clusters is {cfg.dataset.num_clusters} and there are {len(images.fit)} images",
            expected="between 1 cluster and one for each image",
            do="set dataset.num_clusters",
        )


def make_datamodule(cfg: DictConfig, images: ImageSet) -> ImageDataModule:
    """What feeds training and the clean pass; it is given no labels."""
    return ImageDataModule(
        fit=images.fit,
        extra=images.extra,
        views=build(cfg.multi_view),
        batch_size=cfg.batch_size,
        clean_batch_size=cfg.clean_batch_size,
        drop_last=cfg.drop_last,
        seed=cfg.seed,
    )


def make_judge(cfg: DictConfig, images: ImageSet) -> Judge:
    """What scores the run."""
    return Judge(
        images=images.evaluation,
        labels=images.labels,
        num_classes=cfg.dataset.num_classes or 0,
        num_clusters=cfg.dataset.num_clusters,
        seed=cfg.seed,
        **cfg.evaluation,
    )


def build_each(nodes: DictConfig | None, at_hand: dict[str, Any]) -> list[Any]:
    """Callbacks or loggers by name; `needs` of a node maps an argument to what is at hand."""
    built = []
    for node in (nodes or {}).values():
        node = copy.deepcopy(node)  # knows its place, so that interpolations still resolve
        OmegaConf.set_struct(node, False)
        needs = node.pop("needs", {})
        built.append(build(node, **{name: at_hand[what] for name, what in needs.items()}))
    return built


def describe(cfg: DictConfig, images: ImageSet, trainer: Trainer, judgement: Judgement) -> dict[str, Any]:
    """What results.json says of a run, but for its cost."""
    return {
        "format": 1,
        "method": cfg.names.method,
        "dataset": cfg.dataset.name,
        "backbone": cfg.names.backbone,
        "seed": cfg.seed,
        "num_images": len(images.fit),
        "num_clusters": cfg.dataset.num_clusters,
        "num_classes": cfg.dataset.num_classes if images.labels is not None else None,
        "scores": judgement.scores,
        "health": judgement.health,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "world_size": trainer.world_size,
        "command": command_line(),
        "versions": versions(),
        "commit": commit(),
    }


def quiet_lightning() -> None:
    """Leave Lightning's advice out: what it says of this set-up is known and decided."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
