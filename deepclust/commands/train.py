"""`deepclust train`: from a configuration to a finished run folder, on one page."""

import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning import LightningDataModule, Trainer
from omegaconf import DictConfig

from deepclust.callbacks.last_checkpoint import LastCheckpoint
from deepclust.clustering.backend import clustering_settings
from deepclust.clustering.number_of_clusters import ClusterNumberEstimate
from deepclust.config.override_format import format_override
from deepclust.config.plain_values import resolve_to_dict
from deepclust.datasets.image_sources import ImageSet
from deepclust.engine import cuda_graphs
from deepclust.engine.cpu_threads import num_threads_set
from deepclust.engine.devices import count_devices
from deepclust.engine.launch import launched_rank, run_on_devices
from deepclust.engine.lightning_settings import silence_lightning
from deepclust.engine.run_status import heartbeats_written, run_state_recorded
from deepclust.methods.base import ClusteringMethod
from deepclust.runs.assemble import (
    build_datamodule,
    build_evaluator,
    build_method,
    build_trainer,
    prepare_for_hardware,
)
from deepclust.runs.check_run import check_run
from deepclust.runs.checkpoint import load_checkpoint, load_method
from deepclust.runs.earlier_stage import find_earlier_run
from deepclust.runs.hydra_files import write_hydra_files
from deepclust.runs.memory_check import check_memory
from deepclust.runs.open_dataset import open_dataset
from deepclust.runs.provenance import read_going_on
from deepclust.runs.resolve_config import record_choices, resolve_config
from deepclust.runs.results import compose_results, read_results
from deepclust.runs.resume_checks import check_same_recipe, fill_open_values, warn_of_other_seeding
from deepclust.runs.run_folder import CHECKPOINT, acquire_run_lock, check_run_files
from deepclust.runs.summary import print_summary
from deepclust.runs.training_length import lower_max_epochs_to_max_steps
from deepclust.runs.trusted_targets import list_trusted, read_run_config
from deepclust.runs.write_run import write_run

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> dict[str, Any]:
    """Run one training in Hydra's folder and return the content of results.json. A finished run is only shown.

    Raises:
        InputError: if the folder holds a run of another recipe, or another process trains in it.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    is_first = launched_rank() == 0  # the first of the processes speaks for all
    if not is_first:
        logging.root.setLevel(logging.WARNING)
    check_run_files(folder)
    if (results := read_results(folder)) is not None:
        if (folder / CHECKPOINT).exists():
            checkpoint = load_checkpoint(folder)
            check_same_recipe(read_run_config(checkpoint), resolve_to_dict(fill_open_values(cfg, checkpoint)))
        log.info("%s is finished already; nothing to do", folder)
    else:
        with (
            acquire_run_lock(folder) if is_first else nullcontext(),
            run_state_recorded(folder) if is_first else nullcontext(),
        ):
            if is_first:
                write_hydra_files(folder, cfg, replace=True)
            results = run(record_choices(cfg), folder)
    if is_first:
        print_summary(results, folder)
    return results


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Run the stage before this one, if there is one, then `train` on the devices; return what `train` returns.

    Raises:
        InputError: if the configuration cannot be used, before anything is done that takes time.
    """
    check_run(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    earlier = find_earlier_run(cfg, folder, run_stage=run)
    try:
        return run_on_devices(
            train,
            cfg,
            folder,
            earlier,
            num_devices=count_devices(cfg.hardware.accelerator, cfg.hardware.devices),
            num_nodes=cfg.hardware.num_nodes,
            strategy_is_auto=cfg.hardware.strategy == "auto",
            going_on=read_going_on() or f"the same command with {format_override('hydra.run.dir', str(folder))}",
        )
    finally:
        cuda_graphs.release_recordings()  # their memory, for the runs that follow in this process


def train(cfg: DictConfig, folder: Path, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """Fit, cluster, score and write the run folder; return the content of results.json. Runs on every process.

    Raises:
        InputError: if configuration, images and the checkpoint in the folder do not fit each other.
    """
    silence_lightning()
    with heartbeats_written(folder) if launched_rank() == 0 else nullcontext():
        images = open_dataset(cfg.dataset)
        saved_config = read_run_config(load_checkpoint(folder)) if (folder / CHECKPOINT).exists() else None
        cfg, estimate = resolve_config(cfg, images, earlier, saved_config)
        with num_threads_set(cfg.hardware.threads), clustering_settings(**cfg.clustering):
            return train_on_images(cfg, images, folder, estimate, saved_config)


def train_on_images(
    cfg: DictConfig,
    images: ImageSet,
    folder: Path,
    estimate: ClusterNumberEstimate | None,
    saved_config: dict[str, Any] | None,
) -> dict[str, Any]:
    """Do what is left of `train` once the configuration is resolved; `estimate` is that of the number of clusters.

    `saved_config` is the configuration in the checkpoint from which the run goes on; None: it begins.

    Raises:
        InputError: if configuration and the checkpoint in the folder do not fit each other, or the memory is too small.
    """
    check_memory(cfg)
    datamodule = build_datamodule(cfg, images)
    cfg = lower_max_epochs_to_max_steps(cfg, datamodule.batches_per_epoch)
    method = build_method(cfg)
    if saved_config is not None:
        check_same_recipe(saved_config, resolve_to_dict(cfg))
        warn_of_other_seeding(saved_config, resolve_to_dict(cfg))
    elif cfg.earlier.run is not None:
        earlier_checkpoint = load_checkpoint(Path(cfg.earlier.run))
        method.start_from(load_method(earlier_checkpoint, trust=list_trusted(cfg))[1])
    prepare_for_hardware(cfg, method, datamodule)
    evaluator = build_evaluator(cfg, images)
    trainer = build_trainer(cfg, folder, evaluator)

    train_seconds = fit(trainer, method, datamodule, None if saved_config is None else folder / CHECKPOINT)
    method.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
    if method.e_step_every_n_epochs:
        method.run_e_step(trainer.current_epoch)  # what the last E-step inferred lags behind the weights
    method.check_losses_are_finite()
    method.check_weights_are_finite()
    started = time.monotonic()
    evaluator = replace(evaluator, num_clusters=method.num_clusters)  # which it may have found itself
    evaluation = evaluator(method, datamodule)
    evaluate_seconds = time.monotonic() - started
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LastCheckpoint):
            train_seconds += callback.earlier_train_seconds
            callback.save(trainer, method, **evaluation.assignment_state)

    results = compose_results(
        cfg,
        images,
        trainer,
        evaluation,
        train_seconds=train_seconds,
        e_step_seconds=method.e_step_seconds,
        evaluate_seconds=evaluate_seconds,
        pixel_scores=evaluator.score_pixels(max_values=cfg.pixel_baseline_max_values),
        estimate=estimate,
    )
    if trainer.is_global_zero:
        write_run(folder, results, evaluation, images, cfg, loggers=trainer.loggers)
    return results


def fit(trainer: Trainer, method: ClusteringMethod, datamodule: LightningDataModule, checkpoint: Path | None) -> float:
    """Train, from a checkpoint on where there is one, and return the seconds that it took."""
    started = time.monotonic()
    # Lightning would do so after it has loaded the checkpoint, whose float64 weights would lose half of their digits.
    trainer.precision_plugin.convert_module(method)
    try:
        trainer.fit(method, datamodule, ckpt_path=None if checkpoint is None else str(checkpoint))
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        raise
    seconds = time.monotonic() - started
    cuda_graphs.release_recordings()  # what follows may need their memory
    return seconds
