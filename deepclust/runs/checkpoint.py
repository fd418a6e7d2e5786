"""The checkpoint of a run: read, checked, and turned back into the trained method."""

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from deepclust.callbacks.last_checkpoint import CHECKPOINT_FORMAT
from deepclust.config.build import build
from deepclust.datasets.image_decoding import Kept, StoredSize
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.runs.hub_form import read_hub_form
from deepclust.runs.run_folder import CHECKPOINT, HUB_CONFIG, HUB_WEIGHTS, check_holds_run, is_in_hub_form
from deepclust.runs.trusted_targets import (
    MAX_BITS,
    malformed_config_error,
    open_run_config,
    shorten,
    without_weight_sources,
)


def load_checkpoint(run: Path) -> dict[str, Any]:
    """Load the last checkpoint of a run folder on the CPU: tensors, numbers and text, and never an object.

    The folder may be one of `deepclust export format=hub`, too: it has the same entries but for those of training.

    Raises:
        InputError: if there is none, it is damaged, or another version of deepclust wrote it.
    """
    path = run / CHECKPOINT
    if is_in_hub_form(run):
        shared_run = read_hub_form(run)
        check_checkpoint_format(run / HUB_CONFIG, shared_run)
        return shared_run
    check_holds_run(run)
    try:
        with zipfile.ZipFile(path) as file:
            # torch unpacks whatever the members say that they are, and does not look at the checksums
            is_bomb = sum(info.file_size for info in file.infolist()) > path.stat().st_size
            is_damaged = is_bomb or file.testzip() is not None
        checkpoint = None if is_damaged else torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # both readers raise many kinds of exceptions
        raise damaged_checkpoint_error(path) from error
    if not isinstance(checkpoint, dict):
        raise damaged_checkpoint_error(path)
    check_checkpoint_format(path, checkpoint)
    return checkpoint


def check_checkpoint_format(path: Path, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of another format.

    Raises:
        InputError: naming the file and both formats.
    """
    version = checkpoint.get("format", 1)
    if not isinstance(version, int) or version != CHECKPOINT_FORMAT:
        # A made-up value may have no end when it is written out.
        is_short = isinstance(version, str) or (isinstance(version, int) and version.bit_length() <= MAX_BITS)
        found = shorten(str(version)) if is_short else type(version).__name__
        raise InputError(
            f"{path} was written by another version of deepclust (format {found})",
            expected=f"a checkpoint of format {CHECKPOINT_FORMAT}",
            do="use the version that wrote it, or train again in another folder (hydra.run.dir=DIR)",
        )


def damaged_checkpoint_error(path: Path) -> InputError:
    """Return the error for a file that cannot be read as a checkpoint."""
    return InputError(
        f"{path} is damaged",
        expected="the checkpoint as it was written",
        do="delete it, and the run starts anew, or bring back a copy",
    )


def load_finished_checkpoint(run: Path) -> dict[str, Any]:
    """Load the checkpoint of a finished run, which holds what new images are assigned with.

    Raises:
        InputError: if the run has not ended, or is none.
    """
    checkpoint = load_checkpoint(run)
    if "kmeans_centroids" not in checkpoint:
        raise InputError(f"{run} is not a finished run", expected="one that has ended", do="let it go on to its end")
    shapes = {name: tuple(getattr(checkpoint.get(name), "shape", ())) for name in ("kmeans_centroids", "cluster_means")}
    scale = checkpoint.get("kmeans_scale")
    is_scale = isinstance(scale, Tensor) and scale.numel() == 1
    if not is_scale or len(shapes["kmeans_centroids"]) != 2 or len({*shapes.values()}) != 1:
        raise damaged_checkpoint_error(run / (CHECKPOINT if (run / CHECKPOINT).exists() else HUB_WEIGHTS))
    return checkpoint


def load_method(checkpoint: dict[str, Any], *, trust: Iterable[str] = ()) -> tuple[DictConfig, ClusteringMethod]:
    """Return the configuration and the trained method of a checkpoint, in evaluation mode.

    This is the only way from a run to objects. `trust` names packages besides our own whose code may be run
    (`open_run_config`).

    Raises:
        InputError: if the configuration names code that is not trusted, or the weights are not those of the method
            or not finite.
    """
    cfg = open_run_config(checkpoint, trust=trust)
    section = OmegaConf.create({"method": without_weight_sources(checkpoint["config"]["method"])})
    try:
        method = build(section.method)
        if not isinstance(method, ClusteringMethod):
            raise malformed_config_error(f"method describes no method, but a {type(method).__name__}")
        method.load_state_dict(checkpoint["state_dict"])
        method.check_weights_are_finite()
    except InputError:
        raise
    except Exception as error:  # what constructors and torch say of arguments and weights that do not fit
        reason = shorten(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        raise InputError(
            f"the method and the weights in the checkpoint do not fit: {reason}",
            expected="a checkpoint as deepclust wrote it",
            do="use the version that wrote it, or bring back a copy",
        ) from error
    return cfg, method.eval()


def stored_image_shape(run_cfg: DictConfig) -> tuple[StoredSize, int]:
    """Return the short side in pixels, or "original", and the channels in which a run's own images are stored."""
    source = run_cfg.dataset.source
    image_size = source.get("image_size") or (source.get("make") or {}).get("image_size")
    image_size = image_size or run_cfg.dataset.get("stored_size") or run_cfg.dataset.image_size
    return image_size, run_cfg.dataset.channels


def find_kept(run_cfg: DictConfig) -> Kept:
    """Return whether a run's own images are stored whole, or their central squares."""
    source = run_cfg.dataset.source
    return source.get("keep") or (source.get("make") or {}).get("keep") or "central_squares"


def compute_checksum(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: of their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
