"""A finished run in the form of a model on the Hugging Face Hub: weights, configuration, results and a model card.

`model.safetensors` holds every tensor: the weights and buffers of the method, with `method.` before their names, and
what assigns new images. `config.json` holds the configuration of the run. No file holds an object that reading it
would build.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deepclust import __version__
from deepclust.callbacks.last_checkpoint import CHECKPOINT_FORMAT
from deepclust.config.keys import iterate_entries
from deepclust.engine.output_files import write_bytes, write_text
from deepclust.engine.small_files import read_json
from deepclust.errors import InputError
from deepclust.runs.run_folder import HUB_CARD, HUB_CONFIG, HUB_WEIGHTS, RESULTS

LIBRARY = "deepclust"
METHOD_PREFIX = "method."
ASSIGNMENT_STATE = ("kmeans_centroids", "kmeans_scale", "cluster_means")
SHARED_DATA_DIR = "data"  # stands in a shared run for the folder of data sets of the machine that made it


def write_hub_form(folder: Path, checkpoint: dict[str, Any], results: dict[str, Any] | None, card: str) -> list[str]:
    """Write a run into an empty folder; return the keys that name paths of this machine, with their values."""
    from safetensors.torch import save

    weights = {f"{METHOD_PREFIX}{name}": value for name, value in checkpoint["state_dict"].items()}
    tensors = weights | {name: checkpoint[name] for name in ASSIGNMENT_STATE}
    # Copies, because two names may share memory, as those of tied weights do; safetensors has no such thing.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    write_bytes(folder / HUB_WEIGHTS, save(tensors, metadata={"format": "pt"}))
    documents = {HUB_CONFIG: compose_hub_config(checkpoint)} | ({RESULTS: results} if results else {})
    for name, document in documents.items():
        write_text(folder / name, json.dumps(document, indent=2) + "\n")
    write_text(folder / HUB_CARD, card)
    return [f"{name}: {found}" for name, document in documents.items() for found in find_paths(document)]


def compose_hub_config(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the content of config.json for the checkpoint of a run."""
    config = checkpoint["config"]
    return {
        "library_name": LIBRARY,
        "library_version": __version__,
        "format": CHECKPOINT_FORMAT,
        "config": replace_data_dir(config, data_dir) if os.path.isabs(data_dir := config["data_dir"]) else config,
        "weights": list(checkpoint["state_dict"]),  # in their order, on which the checksum of a run depends
    }


def replace_data_dir(node: Any, data_dir: str) -> Any:
    """Return a section in which paths below the folder of data sets begin with SHARED_DATA_DIR instead."""
    if isinstance(node, dict):
        return {name: replace_data_dir(child, data_dir) for name, child in node.items()}
    if isinstance(node, list):
        return [replace_data_dir(child, data_dir) for child in node]
    if isinstance(node, str) and (node == data_dir or node.startswith(f"{data_dir}/")):
        return SHARED_DATA_DIR + node.removeprefix(data_dir)
    return node


def find_paths(document: dict[str, Any]) -> Iterator[str]:
    """Yield KEY=VALUE of every text that holds an absolute path or one of a home folder."""
    for key, value in iterate_entries(document):
        if isinstance(value, str) and re.search(r"(^|[\s='\"\[,])~?/\w", value):
            yield f"{key}={value}"


def read_hub_form(folder: Path) -> dict[str, Any]:
    """Read a run in this form as `deepclust.runs.checkpoint.load_checkpoint` returns it, on the CPU.

    Raises:
        InputError: if a file is damaged, or the package `safetensors` is missing.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError(
            f"{folder / HUB_WEIGHTS} needs safetensors",
            expected="the optional packages of deepclust[hub]",
            do="pip install safetensors",
        ) from error
    path = folder / HUB_CONFIG
    try:
        document = read_json(path)
        if not isinstance(document, dict) or document.get("library_name") != LIBRARY:
            raise ValueError("it is not of deepclust")
        path = folder / HUB_WEIGHTS
        if not path.is_file():  # reading a pipe would wait for ever
            raise ValueError("it is no regular file")
        tensors = load_file(path)
        weights = {name: tensors[METHOD_PREFIX + name] for name in document["weights"]}
    except PermissionError:
        raise
    except Exception as error:  # safetensors has exceptions of its own
        raise InputError(
            f"{path} cannot be read as a part of a run: {' '.join(str(error).split())[:200]}",
            expected="the files as deepclust export format=hub wrote them",
            do="download or export the run again",
        ) from error
    assignment_state = {name: tensors[name] for name in ASSIGNMENT_STATE if name in tensors}
    known = {"format": document.get("format"), "config": document.get("config")}
    return {**known, "state_dict": weights, **assignment_state}
