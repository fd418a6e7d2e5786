"""What a run leaves behind, and how it is read again."""

import csv
import fcntl
import hashlib
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from deepclust import __version__
from deepclust.config import build
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod

RESULTS, CHECKPOINT, ASSIGNMENTS = "results.json", "checkpoints/last.ckpt", "assignments.csv"
PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "hydra-core",
    "numpy",
    "scikit-learn",
)
RECIPE = (
    *("backbone", "method", "dataset", "views", "view_names", "multi_view"),
    *("seed", "batch_size", "drop_last", "sync_batchnorm"),
)
# What of `trainer` changes nothing in what is learned, or is wanted to change: a run may go on for longer.
NOT_LEARNED = (
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "benchmark", "deterministic"),
    *("max_epochs", "max_steps", "max_time", "num_sanity_val_steps", "use_distributed_sampler", "log_every_n_steps"),
    *("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger", "callbacks", "profiler"),
)


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """results.json, all at once: its presence means that the run is complete."""
    beside = folder / "results.json.writing"
    beside.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(beside, folder / RESULTS)
    (folder / "error.txt").unlink(missing_ok=True)  # of an earlier start


def read_results(folder: Path) -> dict[str, Any] | None:
    """results.json of a finished run; None where there is none."""
    path = folder / RESULTS
    return json.loads(path.read_text()) if path.exists() else None


def write_assignments(
    path: Path,
    assignments: Tensor,
    confidence: Tensor,
    *,
    labels: Any | None = None,
    paths: list[str] | None = None,
) -> None:
    """One line an image: index, cluster, confidence and, where known, label and path."""
    columns: dict[str, Any] = {
        "index": range(len(assignments)),
        "cluster": assignments.tolist(),
        "confidence": [f"{c:.6f}" for c in confidence.tolist()],
    }
    if labels is not None:
        columns["label"] = labels.tolist()
    if paths is not None:
        columns["path"] = paths
    beside = path.with_name(path.name + ".writing")
    with beside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    os.replace(beside, path)


def load_checkpoint(run: Path) -> dict[str, Any]:
    """The last checkpoint of a run folder, on the CPU.

    Raises:
        InputError: where there is none, or it is damaged.
    """
    path = run / CHECKPOINT
    if not path.exists():
        raise InputError(f"{run} holds no {CHECKPOINT}", expected="the folder of a run", do="check run=DIR")
    try:
        with zipfile.ZipFile(path) as file:  # torch does not look at the check sums
            damaged = file.testzip() is not None
    except (zipfile.BadZipFile, OSError, EOFError):
        damaged = True
    if damaged:
        raise InputError(
            f"{path} is damaged",
            expected="the checkpoint as it was written",
            do="delete it, and the run starts anew, or bring back a copy",
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def load_finished(run: Path) -> dict[str, Any]:
    """The checkpoint of a run that has ended, which holds what new images are held against.

    Raises:
        InputError: where the run has not ended, or is none.
    """
    checkpoint = load_checkpoint(run)
    if "kmeans_centroids" not in checkpoint:
        raise InputError(f"{run} is not a finished run", expected="one that has ended", do="let it go on to its end")
    return checkpoint


def load_method(checkpoint: dict[str, Any]) -> tuple[DictConfig, ClusteringMethod]:
    """The configuration and the trained method, in evaluation mode, of a checkpoint."""
    cfg = OmegaConf.create(checkpoint["config"])
    assert isinstance(cfg, DictConfig)
    method = build(cfg.method)
    method.load_state_dict(checkpoint["state_dict"])
    return cfg, method.eval()


def checksum(state: dict[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pick_device(accelerator: str) -> torch.device:
    """The device that `accelerator` (auto, cpu, gpu) means on this machine."""
    use_gpu = torch.cuda.is_available() if accelerator == "auto" else accelerator in ("gpu", "cuda")
    return torch.device("cuda" if use_gpu else "cpu")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a run folder against other processes, which would write over each other's files.

    Raises:
        InputError: where another process holds it.
    """
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process trains in {folder}",
                expected="one at a time",
                do="wait for it, or start in another folder (hydra.run.dir=DIR)",
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(held)


def check_same_recipe(checkpoint: dict[str, Any], config: dict[str, Any], *, open_keys: bool = False) -> None:
    """Refuse to go on from a checkpoint that another recipe made; `open_keys`: what the images have not filled in yet
    may be anything.

    Raises:
        InputError: naming the first key that differs.
    """
    before, now = recipe(checkpoint["config"]), recipe(config)
    for key in sorted({*before, *now}):
        if open_keys and now.get(key) in (None, "auto"):
            continue
        if before.get(key) != now.get(key):
            cure = "give the same start=DIR" if key.startswith("earlier") else f"set {key}={before.get(key)}"
            raise InputError(
                f"the checkpoint in this folder was made with {key}={before.get(key)}, this run has {now.get(key)}",
                expected="the same recipe when a run goes on",
                do=f"{cure}, or start in another folder (hydra.run.dir=DIR)",
            )


def recipe(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration decides on what is learned, by dotted key."""
    parts = {group: config.get(group) for group in RECIPE}
    parts["earlier"] = {"sha256": config["earlier"]["sha256"]}  # wherever that run's folder lies by now
    trainer = config["trainer"]
    parts["trainer"] = {name: trainer[name] for name in trainer if name not in NOT_LEARNED}
    parts["hardware"] = {"precision": config["hardware"]["precision"]}
    keys = {key: value for name, node in parts.items() for key, value in flatten(node, name).items()}
    keys.pop("dataset.source.data_dir", None)  # where decoded images are kept
    return keys


def flatten(node: Any, prefix: str) -> dict[str, Any]:
    """Leaves of a nested configuration by dotted key."""
    if isinstance(node, dict):
        return {k: v for name, child in node.items() for k, v in flatten(child, f"{prefix}.{name}").items()}
    return {prefix: node}


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on."""
    ours = {
        "python": platform.python_version(),
        "deepclust": __version__,
    }  # also where the source tree is not installed
    return ours | {name: version(name) for name in PACKAGES}


def commit() -> str | None:
    """The commit of the source tree that runs, with `-dirty` if files differ; None outside a checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).resolve().parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> str:
    """What was typed."""
    return shlex.join([*Path(sys.argv[0]).name.split(), *sys.argv[1:]])  # the first is "deepclust VERB"


def peak_memory_bytes() -> int:
    """Most memory in use so far: the device's on a GPU, the process's otherwise."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()  # of CUDA graphs, too, which allocate nothing
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
