"""The parts of a run, built from its resolved configuration: data, method, evaluator and trainer."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig

from deepclust.callbacks.evaluation import Evaluator
from deepclust.config.build import build, build_each
from deepclust.config.plain_values import resolve_to_dict
from deepclust.datasets.datamodule import ImageDataModule
from deepclust.datasets.image_sources import ImageSet
from deepclust.datasets.sampled_rows import find_sampled_rows
from deepclust.engine.batch_norm import check_groups
from deepclust.engine.hardware_options import apply_hardware_options
from deepclust.engine.lightning_settings import disable_lightning_requeue
from deepclust.methods.base import ClusteringMethod
from deepclust.runs.provenance import read_going_on

# What `needs` of a callback or logger can name.
NAMES_IN_NEEDS = ("folder", "evaluator", "config", "going_on", "shorter_ways")
SMALL_IMAGE_SIZE = 32  # pixels, for which backbone=conv_small is made


def build_datamodule(cfg: DictConfig, images: ImageSet) -> ImageDataModule:
    """Build what feeds training and the clean pass. It is given no labels."""
    return ImageDataModule(
        fit=images.fit,
        extra=images.extra,
        views=build(cfg.multi_view),
        batch_size=cfg.batch_size,
        clean_batch_size=cfg.clean_batch_size,
        drop_last=cfg.drop_last and cfg.trainer.max_epochs > 0,  # without a training, no batch has to be full
        resident_bytes=cfg.hardware.resident_bytes,
        seed=cfg.seed,
    )


def build_method(cfg: DictConfig) -> ClusteringMethod:
    """Build the method with its initial weights, which the seed decides on; every later draw has a key of its own."""
    torch.manual_seed(cfg.seed)
    return build(cfg.method)


def prepare_for_hardware(cfg: DictConfig, method: ClusteringMethod, datamodule: ImageDataModule) -> None:
    """Apply the options of `cfg.hardware`, and those of batch normalisation, to a method and to the views of its data.

    Raises:
        InputError: if options do not fit each other, the batch size or the number of processes.
    """
    check_groups(cfg.batch_norm_groups, sync_batchnorm=cfg.sync_batchnorm)
    apply_hardware_options(
        method,
        datamodule.views,
        channels_last=cfg.hardware.channels_last,
        sync_batchnorm=cfg.sync_batchnorm,
        batch_norm_groups=cfg.batch_norm_groups,
        compile=cfg.hardware.compile,
        graphs=cfg.hardware.graphs,
        fused_optimizer=cfg.hardware.fused_optimizer,
    )


def build_evaluator(cfg: DictConfig, images: ImageSet) -> Evaluator:
    """Build what scores the run."""
    num_clusters = 1 if cfg.dataset.num_clusters == "auto" else cfg.dataset.num_clusters  # until the method finds it
    return Evaluator(
        images=images.evaluation,
        labels=images.labels,
        num_classes=cfg.dataset.num_classes or 0,
        num_clusters=num_clusters,
        seed=cfg.seed,
        kmeans_rows=find_sampled_rows(images.fit, images.evaluation),
        **cfg.evaluation,
    )


def build_trainer(
    cfg: DictConfig, folder: Path, evaluator: Evaluator, extra_callbacks: Sequence[Callback] = (), **arguments: Any
) -> Trainer:
    """Build the trainer with the callbacks and loggers of the configuration.

    `extra_callbacks` and `arguments` of the trainer are for what measures it.
    """
    objects = (folder, evaluator, resolve_to_dict(cfg), read_going_on(), describe_shorter_ways(cfg))
    available = dict(zip(NAMES_IN_NEEDS, objects, strict=True))
    callbacks: list[Callback] = [*build_each(cfg.callbacks, available), *extra_callbacks]
    trainer: Trainer = build(
        cfg.trainer,
        callbacks=callbacks,
        logger=build_each(cfg.logger, available),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        **arguments,
    )
    disable_lightning_requeue(trainer)
    return trainer


def describe_shorter_ways(cfg: DictConfig) -> str | None:
    """Return what takes less time than this run, for people without a GPU; None where it is the small way already."""
    ways = []
    if cfg.names.backbone not in ("conv_small", "mlp", "identity") and cfg.dataset.image_size > SMALL_IMAGE_SIZE:
        ways.append(f"backbone=conv_small dataset.image_size={SMALL_IMAGE_SIZE}")
    if str(cfg.dataset.source.get("_target_")).endswith(".load_folder"):
        path = shlex.quote(str(cfg.dataset.path))
        ways.append(f"deepclust cluster images={path} num_clusters={cfg.dataset.num_clusters}, which takes minutes")
    return ", or ".join(ways) or None
