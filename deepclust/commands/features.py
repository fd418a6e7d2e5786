"""`deepclust features`: the features of a data set by a finished run's network or any backbone, made once and kept."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from deepclust.batch import cache_sized
from deepclust.config.build import build
from deepclust.config.values import resolve_to_dict
from deepclust.datasets.dataset_checks import infer_dataset_values
from deepclust.datasets.image_sources import ImageSet, ImageSource
from deepclust.engine.devices import select_device
from deepclust.engine.progress import track
from deepclust.errors import InputError
from deepclust.runs.checkpoint import compute_checksum, load_checkpoint, load_method
from deepclust.views.multiview import MultiView

MADE_BY = "made_by.json"  # written last: where it is, the folder is complete


def main(cfg: DictConfig) -> Path:
    """The folder with the features; one that is complete and was made by the same network of the same images stays."""
    described = describe_images(cfg)
    images: ImageSet = build(described.dataset.source)
    described.dataset.update(infer_dataset_values(described.dataset, images))
    maker, network, encode = make_network(cfg, described)
    dataset = resolve_to_dict(described)["dataset"]
    dataset["source"].pop("data_dir", None)  # where decoded images are kept says nothing of them
    made_by = {
        "dataset": dataset,
        "images_sha256": fingerprint(images.fit),
        "paths_sha256": None if images.paths is None else sha256(json.dumps(images.paths).encode()).hexdigest(),
        "views": resolve_to_dict(described)["views"]["clean"],
        "weights_sha256": compute_checksum(network.state_dict()),
    }
    key = sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    folder = Path(cfg.output or f"{cfg.data_dir}/features/{described.dataset.name}-{maker}-{key[:8]}")
    if (folder / MADE_BY).is_file() and json.loads((folder / MADE_BY).read_text())["sha256"] == key:
        print(f"there already: {folder}")
        return folder

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MADE_BY).is_file():  # labels and pictures made before would pass for those of these images
        for earlier in [*folder.glob("*_*.npy"), *folder.glob("*_paths.json"), folder / "class_names.json"]:
            earlier.unlink(missing_ok=True)
        (folder / MADE_BY).unlink()
    device = select_device(cfg.accelerator)
    network.to(device).to(memory_format=torch.channels_last)
    scale = described.get("multi_view") or described.dataset  # a run may have been told other numbers
    views = MultiView(pipelines=build(described.views), names=[], mean=scale.mean, std=scale.std)

    def embed(pixels: Tensor) -> Tensor:
        return torch.cat([encode(part) for part in cache_sized(views.clean(pixels.to(device)))]).float()

    splits = {"train": images.fit} | ({} if images.evaluation is images.fit else {"test": images.evaluation})
    for split, source in splits.items():
        write_rows(folder / f"{split}_features.npy", source, embed, cfg.batch_size)
        if len(source) <= cfg.max_pictures and source.shape[2] in (1, 3):
            write_rows(
                folder / f"{split}_images.npy", source, lambda pixels: pixels.permute(0, 2, 3, 1), cfg.batch_size
            )
    if images.labels is not None:
        np.save(folder / f"{list(splits)[-1]}_labels.npy", images.labels)
    if images.paths is not None:
        (folder / f"{list(splits)[-1]}_paths.json").write_text(json.dumps(images.paths))
    if images.class_names is not None:
        (folder / "class_names.json").write_text(json.dumps(images.class_names))
    beside = folder / f"{MADE_BY}.writing"
    beside.write_text(json.dumps({"sha256": key, **made_by}, indent=2) + "\n")
    os.replace(beside, folder / MADE_BY)
    print(f"features of {len(images.fit)} images: {folder}")
    return folder


def describe_images(cfg: DictConfig) -> DictConfig:
    """The configuration that holds the data set and its views: the run's, with another data set if one is named."""
    if cfg.run is None:
        if "backbone" not in cfg or "dataset" not in cfg:
            raise InputError(
                "neither a run nor a backbone with a data set is named",
                expected="what makes the features, and of which images",
                do="add run=DIR, or dataset=NAME backbone=NAME",
            )
        return cfg
    described = OmegaConf.create(load_checkpoint(Path(cfg.run))["config"])
    if "dataset" in cfg:
        described.dataset = resolve_to_dict(cfg)["dataset"]
    assert isinstance(described, DictConfig)
    return described


def make_network(cfg: DictConfig, described: DictConfig) -> tuple[str, nn.Module, Callable[[Tensor], Tensor]]:
    """A name, the network in evaluation mode, and how it makes features (N, D) of clean images."""
    if cfg.run is not None:
        run_cfg, method = load_method(load_checkpoint(Path(cfg.run)))
        return run_cfg.names.method, method, method.encode
    torch.manual_seed(cfg.seed)
    backbone = build(described.backbone).eval()
    return str(cfg.backbone.get("model_name") or type(backbone).__name__).lower(), backbone, backbone


def fingerprint(source: ImageSource, rows: int = 1000) -> str:
    """SHA-256 of the number of images and of up to `rows` of them, evenly spread."""
    spread = np.unique(np.linspace(0, len(source) - 1, min(rows, len(source)), dtype=np.int64))
    return compute_checksum({str(len(source)): source.read(spread)})


@torch.no_grad()
def write_rows(file: Path, source: ImageSource, of: Callable[[Tensor], Tensor], batch_size: int) -> None:
    """`of` all images of `source`, in order, as the rows of a .npy file."""
    rows: Any = None
    for start in track(range(0, len(source), batch_size), f"writing {file.name}"):
        made = of(source.read(np.arange(start, min(start + batch_size, len(source))))).cpu().numpy()
        if rows is None:
            rows = np.lib.format.open_memmap(file, mode="w+", dtype=made.dtype, shape=(len(source), *made.shape[1:]))
        rows[start : start + len(made)] = made
    rows.flush()
