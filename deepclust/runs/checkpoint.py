"""The checkpoint of a run: read, checked, and turned back into the trained method."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from deepclust.callbacks.last_checkpoint import CHECKPOINT_FORMAT
from deepclust.config.build import build
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.runs.folder import CHECKPOINT


def load_checkpoint(run: Path) -> dict[str, Any]:
    """Load the last checkpoint of a run folder on the CPU.

    Raises:
        InputError: if there is none, it is damaged, or another version of deepclust wrote it.
    """
    path = run / CHECKPOINT
    if not path.exists():
        raise InputError(f"{run} holds no {CHECKPOINT}", expected="the folder of a run", do="check run=DIR")
    try:
        with zipfile.ZipFile(path) as file:  # torch does not look at the checksums
            is_damaged = file.testzip() is not None
    except (zipfile.BadZipFile, OSError, EOFError):
        is_damaged = True
    if is_damaged:
        raise InputError(
            f"{path} is damaged",
            expected="the checkpoint as it was written",
            do="delete it, and the run starts anew, or bring back a copy",
        )
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise InputError(
            f"{path} was written by another version of deepclust (format {checkpoint.get('format', 1)})",
            expected=f"a checkpoint of format {CHECKPOINT_FORMAT}",
            do="use the version that wrote it, or train again in another folder (hydra.run.dir=DIR)",
        )
    return checkpoint


def load_finished_checkpoint(run: Path) -> dict[str, Any]:
    """Load the checkpoint of a finished run, which holds what new images are assigned with.

    Raises:
        InputError: if the run has not ended, or is none.
    """
    checkpoint = load_checkpoint(run)
    if "kmeans_centroids" not in checkpoint:
        raise InputError(f"{run} is not a finished run", expected="one that has ended", do="let it go on to its end")
    return checkpoint


def load_method(checkpoint: dict[str, Any]) -> tuple[DictConfig, ClusteringMethod]:
    """Return the configuration and the trained method of a checkpoint, in evaluation mode."""
    cfg = OmegaConf.create(checkpoint["config"])
    assert isinstance(cfg, DictConfig)
    method = build(cfg.method)
    method.load_state_dict(checkpoint["state_dict"])
    return cfg, method.eval()


def stored_image_shape(run_cfg: DictConfig) -> tuple[int, int]:
    """Return side in pixels and channels in which a run's own images are stored."""
    source = run_cfg.dataset.source
    image_size = source.get("image_size") or (source.get("make") or {}).get("image_size")
    return image_size or run_cfg.dataset.image_size, run_cfg.dataset.channels


def compute_checksum(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: of their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
