"""`deepclust train`: from a configuration to a finished run folder, the story on one page."""

import copy
import logging
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig, OmegaConf, open_dict

from deepclust import dashboards, distributed, graphs, launch
from deepclust.callbacks.checkpoint import LastCheckpoint
from deepclust.callbacks.evaluation import Judge, Judgement
from deepclust.clustering.number import Estimate, estimate_number, sample_rows
from deepclust.config import build, plain
from deepclust.datasets.datamodule import ImageDataModule
from deepclust.datasets.source import ImageSet
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.optim import fused
from deepclust.run_folder import (
    ASSIGNMENTS,
    CHECKPOINT,
    alone,
    check_same_recipe,
    checksum,
    command_line,
    commit,
    load_checkpoint,
    load_method,
    peak_memory_bytes,
    read_results,
    versions,
    write_assignments,
    write_results,
)
from deepclust.show import judge_pixels, show_run, write_run_report

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> dict[str, Any]:
    """One run in Hydra's folder; a finished one is shown and left alone.

    Raises:
        InputError: where the folder holds a run of another recipe, or another process trains in it.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    if others := launch.rank() > 0:  # the first of the processes speaks for all
        logging.root.setLevel(logging.WARNING)
    if (results := read_results(folder)) is not None:
        if (folder / CHECKPOINT).exists():
            check_same_recipe(load_checkpoint(folder), plain(cfg), open_keys=True)
        log.info("%s is finished already; nothing to do", folder)
    else:
        hydra = HydraConfig.get()  # known in this process only
        for group in cfg.names:
            cfg.names[group] = cfg.names[group] or hydra.runtime.choices[group]
        cfg.overrides = list(hydra.overrides.task)
        with nullcontext() if others else alone(folder):
            results = run(cfg, folder)
    if not others:
        show_run(results, folder)
    return results


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """`train` on the processes that the hardware asks for, after the stage before it; the content of results.json."""
    find_earlier(cfg, folder)
    try:
        return launch.run(train, cfg, folder)
    finally:
        graphs.release()  # for the runs that follow in this process


def find_earlier(cfg: DictConfig, folder: Path) -> None:
    """Write into `cfg.earlier` what this run starts from, if anything; a stage before this one is run first.

    Raises:
        InputError: where `cfg.start` is no finished run.
    """
    if cfg.start is None and cfg.before is None:
        return
    start = folder / "before" if cfg.start is None else Path(cfg.start)
    if cfg.start is None and read_results(start) is None:
        start.mkdir(exist_ok=True)
        earlier = earlier_stage(cfg)
        log.info("first the stage before: %s in %s", earlier.names.method, start)
        run(earlier, start)
        distributed.wait_for_all()  # until the first process has written what follows
    results = read_results(start)
    if results is None:
        raise InputError(f"{start} is no finished run", expected="a folder with results.json", do="set start=DIR")
    checkpoint = load_checkpoint(start)
    cfg.earlier = {
        "run": str(start),
        "method": checkpoint["config"]["method"],
        "sha256": checksum(checkpoint["state_dict"]),
        "train_seconds": results["timing"]["train_seconds"] + results["timing"].get("earlier_seconds", 0.0),
    }


def earlier_stage(cfg: DictConfig) -> DictConfig:
    """The configuration of the stage before: that of this one, with `before` laid over it."""
    earlier = copy.deepcopy(cfg)
    with open_dict(earlier):
        before = earlier.pop("before")
        earlier.before = before.pop("before", None)
        earlier.method = before.pop("method")  # as a whole: the two methods have arguments of their own
        earlier.merge_with(before)
    return earlier


def train(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Fit, cluster, score, write the run folder; the content of results.json. Runs on every process of the run."""
    quiet_lightning()
    images: ImageSet = build(cfg.dataset.source)
    estimate = check_dataset(cfg, images)
    datamodule = make_datamodule(cfg, images)
    torch.manual_seed(cfg.seed)  # initial weights; every later draw has its own key
    method: ClusteringMethod = build(cfg.method)
    resumed = (folder / CHECKPOINT).exists()
    if cfg.earlier.run is not None and not resumed:
        method.start_from(load_method(load_checkpoint(Path(cfg.earlier.run)))[1])
    fit_out(method, datamodule, cfg)

    judge = make_judge(cfg, images)
    config = plain(cfg)
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
    leave_queue_alone(trainer)

    started = time.monotonic()
    try:
        trainer.fit(method, datamodule, ckpt_path=str(folder / CHECKPOINT) if resumed else None)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        raise
    train_seconds = time.monotonic() - started
    graphs.release()  # what follows may need their memory

    method.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
    if method.e_step_every_n_epochs:
        method.renew(trainer.current_epoch)  # what the last E-step inferred lags the weights
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
            "earlier_seconds": cfg.earlier.train_seconds,
            "images_per_second": trainer.global_step * cfg.batch_size / train_seconds,
            "e_step_seconds": method.e_step_seconds,
            "evaluate_seconds": evaluate_seconds,
        },
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if (pixels := judge_pixels(images, judge, max_values=cfg.pixel_baseline_max_values)) is not None:
        results["baseline"] = {"kmeans_on_pixels": pixels}
    if estimate is not None:
        results["number"] = asdict(estimate) | {"says": estimate.says()}
    if trainer.is_global_zero:
        write_assignments(
            folder / ASSIGNMENTS,
            judgement.assignments,
            judgement.confidence,
            labels=images.labels,
            paths=images.paths,
        )
        sheets = write_run_report(folder, results, judgement, images, cfg)
        write_results(folder, results)
        table = None if judgement.table is None else judgement.table.numpy()
        dashboards.send(trainer.loggers, results, sheets, table, images.class_names)
    return results


def fit_out(method: ClusteringMethod, datamodule: ImageDataModule, cfg: DictConfig) -> None:
    """Make a method with its first weights, and its views, ready for the device and the processes of its training.

    Raises:
        InputError: for a mode of torch.compile that does not do here.
    """
    if cfg.hardware.channels_last:
        method.to(memory_format=torch.channels_last)
    if cfg.sync_batchnorm:
        distributed.synchronise_batch_norm(method)
    if cfg.hardware.compile in ("reduce-overhead", "max-autotune"):
        raise InputError(
            f"hardware.compile={cfg.hardware.compile} makes CUDA graphs of its own",
            expected="default or max-autotune-no-cudagraphs",
            do="set hardware.graphs=true for CUDA graphs",
        )
    if cfg.hardware.compile is not None:
        method.compile_networks(cfg.hardware.compile)
    if cfg.hardware.graphs:
        method.use_graphs()
    datamodule.views.prepared = graphs.Prepared(mode=cfg.hardware.compile, replayed=cfg.hardware.graphs)
    if cfg.hardware.fused_optimizer:
        method.make_optimizer = fused(method.make_optimizer)


def check_dataset(cfg: DictConfig, images: ImageSet) -> Estimate | None:
    """Complete the data set's section, and see that the number of clusters is one; the estimate where that was asked
    for (auto).

    Raises:
        InputError: naming the key to change.
    """
    complete_dataset(cfg, images)
    estimate = None
    if cfg.dataset.num_clusters == "auto":
        estimate = count_clusters(images, seed=cfg.seed)
        log.info(estimate.says())
        cfg.dataset.num_clusters = estimate.require_several("dataset.num_clusters")
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
    return estimate


def count_clusters(images: ImageSet, *, seed: int) -> Estimate:
    """How many clusters the vectors of a data set hold; labels are not looked at.

    Raises:
        InputError: where it holds pictures, which say little before a network has seen them, or too few vectors.
    """
    if images.fit.shape[:2] != (1, 1):
        raise InputError(
            "the number of clusters can be told from features, and these are pictures",
            expected="dataset=features, or a number",
            do="run deepclust cluster images=DIR num_clusters=auto, or set dataset.num_clusters=K",
        )
    rows = images.fit.read(sample_rows(len(images.fit), seed)).flatten(1)
    return estimate_number(rows, seed=seed)


def complete_dataset(cfg: DictConfig, images: ImageSet) -> None:
    """Hold the configuration against the images, and write what it left open into it.

    Raises:
        InputError: naming the key to change.
    """
    height, _, channels = images.fit.shape
    found: dict[str, Any] = {"num_images": len(images.fit), "channels": channels}
    if images.name is not None and cfg.dataset.name is None:
        found["name"] = images.name
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


def make_datamodule(cfg: DictConfig, images: ImageSet) -> ImageDataModule:
    """What feeds training and the clean pass; it is given no labels."""
    return ImageDataModule(
        fit=images.fit,
        extra=images.extra,
        views=build(cfg.multi_view),
        batch_size=cfg.batch_size,
        clean_batch_size=cfg.clean_batch_size,
        drop_last=cfg.drop_last,
        resident_bytes=cfg.hardware.resident_bytes,
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
        "overrides": list(cfg.overrides or []),
        "versions": versions(),
        "commit": commit(),
        "earlier": {name: cfg.earlier[name] for name in ("run", "sha256")},
    }


def leave_queue_alone(trainer: Trainer) -> None:
    """Keep Lightning from acting on SIGUSR1 inside Slurm.

    It would write a checkpoint of its own into the working folder, whatever the process is doing, and every later run
    that starts there would take it for its own.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False


def quiet_lightning() -> None:
    """Leave Lightning's advice out: what it says of this set-up is known and decided."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
