"""`deepclust features`: the features of a data set by a finished run's network or any backbone, made once and kept."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn

from deepclust.batch import PaddedImages, split_to_cache_size
from deepclust.config.build import build
from deepclust.config.plain_values import resolve_to_dict
from deepclust.datasets.dataset_checks import infer_dataset_values
from deepclust.datasets.image_sources import ImageSet, ImageSource, read_pictures, spread_positions
from deepclust.datasets.one_time_conversion import write_labels, write_whole_images
from deepclust.engine.devices import select_network_device
from deepclust.engine.output_files import check_output_file, write_array, write_text
from deepclust.engine.plurals import format_count
from deepclust.engine.progress_bar import track
from deepclust.engine.small_files import read_state
from deepclust.errors import InputError
from deepclust.runs.checkpoint import compute_checksum, load_checkpoint, load_method
from deepclust.runs.locate_run import locate_run
from deepclust.runs.open_dataset import open_dataset
from deepclust.runs.trained_model import check_takes_new_images
from deepclust.runs.trusted_targets import open_run_config, split_trust
from deepclust.views.multiview import MultiView

log = logging.getLogger(__name__)

MADE_BY = "made_by.json"  # written last: where it is, the folder is complete
JOURNAL = "blocks.json"  # where it is, features are being written block by block


def main(cfg: DictConfig) -> Path:
    """Return the folder with the features, made unless it is complete and of the same network and the same images.

    Raises:
        InputError: if neither a run nor a backbone with a data set is named.
    """
    if cfg.output is not None:
        check_output_file(Path(cfg.output) / MADE_BY, key="output")
    checkpoint = None if cfg.run is None else load_checkpoint(locate_run(cfg.run))
    source_cfg = select_source_config(cfg, checkpoint)
    images = open_dataset(source_cfg.dataset)
    with open_dict(source_cfg.dataset):  # value_ranges need not be there
        source_cfg.dataset.update(infer_dataset_values(source_cfg.dataset, images))
    network_name, network, encode = build_network(cfg, source_cfg, checkpoint)
    made_by = describe_features(source_cfg, images, network)
    key = sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    default_folder = f"{cfg.data_dir}/features/{source_cfg.dataset.name}-{network_name}-{key[:8]}"
    folder = Path(cfg.output or default_folder)
    if read_made_by(folder) == key:
        print(f"there already: {folder}")
        return folder

    prepare_folder(folder)
    encode_images = prepare_encoder(cfg, source_cfg, network, encode, lambda: images.fit.read(np.arange(1)))
    write_data_set(folder, images, encode_images, batch_size=cfg.batch_size, max_pictures=cfg.max_pictures)
    write_text(folder / MADE_BY, json.dumps({"sha256": key, **made_by}, indent=2) + "\n")
    print(f"features of {format_count(len(images.fit), 'image')}: {folder}")
    return folder


def prepare_encoder(
    cfg: DictConfig,
    source_cfg: DictConfig,
    network: nn.Module,
    encode: Callable[[Tensor], Tensor],
    read_example: Callable[[], Tensor | PaddedImages],
) -> Callable[[Tensor | PaddedImages], Tensor]:
    """Bring the network to its device; return the function from pixels (uint8) to features (N, D), float32.

    `read_example` gives an image by which it is tried whether Apple's GPU can run the network.
    """
    device = select_network_device(cfg.accelerator)
    scale = source_cfg.get("multi_view") or source_cfg.dataset  # a run may have been given other mean and std
    views = MultiView(pipelines=build(source_cfg.views), names=[], mean=scale.mean, std=scale.std)

    @torch.no_grad()
    def encode_images(pixels: Tensor | PaddedImages) -> Tensor:
        clean = views.clean(pixels.to(device))
        return torch.cat([encode(part) for part in split_to_cache_size(clean)]).float()

    try:
        network.to(device).to(memory_format=torch.channels_last)
        if device.type == "mps":
            encode_images(read_example())
    except (RuntimeError, TypeError, AssertionError) as error:  # in which ways torch says that it lacks an operation
        if device.type != "mps":
            raise
        log.warning("the network runs on the CPU, for Apple's GPU cannot: %s", str(error).partition("\n")[0])
        device = torch.device("cpu")
        network.to(device).to(memory_format=torch.channels_last)
    return encode_images


def read_made_by(folder: Path) -> str | None:
    """Return the checksum of what the features in a folder were made of; None if there are none, or not all.

    Raises:
        InputError: if the file that tells it is damaged or something else.
    """

    def check(content: Any) -> str | None:
        return None if isinstance(content, dict) and isinstance(content.get("sha256"), str) else "it names no sha256"

    content = read_state(folder / MADE_BY, check, expected="what the features beside it were made of")
    return None if content is None else content["sha256"]


def select_source_config(cfg: DictConfig, checkpoint: dict[str, Any] | None) -> DictConfig:
    """Return the configuration that holds the data set and its views: the run's, or this command's own.

    `checkpoint` is that of the run, None without one. Of a run, the data set is replaced where another one is named.

    Raises:
        InputError: if neither a run nor a backbone with a data set is named.
    """
    if checkpoint is None:
        if "backbone" not in cfg or "source" not in cfg.dataset:
            raise InputError(
                "neither a run nor a backbone with a data set is named",
                expected="what makes the features, and of which images",
                do="add run=DIR, or dataset=NAME backbone=NAME",
            )
        return cfg
    run_cfg = open_run_config(checkpoint, trust=split_trust(cfg.trust))
    if "source" in cfg.dataset:
        dataset = resolve_to_dict(cfg)["dataset"]
        if "value_ranges" in dataset and dataset["value_ranges"] is None:  # scaled as what the network has seen
            ranges = resolve_to_dict(run_cfg)["dataset"].get("value_ranges")
            dataset["value_ranges"] = dataset["source"]["value_ranges"] = ranges
        run_cfg.dataset = dataset
    return run_cfg


def build_network(
    cfg: DictConfig, source_cfg: DictConfig, checkpoint: dict[str, Any] | None
) -> tuple[str, nn.Module, Callable[[Tensor], Tensor]]:
    """Return a name, the network in evaluation mode, and the function from clean images to features (N, D).

    Raises:
        InputError: if the method of the run clusters only what it was trained on.
    """
    if checkpoint is not None:
        run_cfg, method = load_method(checkpoint, trust=split_trust(cfg.trust))
        check_takes_new_images(method)
        return run_cfg.names.method, method, method.encode
    torch.manual_seed(cfg.seed)
    backbone = build(source_cfg.backbone).eval()
    return str(cfg.backbone.get("model_name") or type(backbone).__name__).lower(), backbone, backbone


def describe_features(source_cfg: DictConfig, images: ImageSet, network: nn.Module) -> dict[str, Any]:
    """Return what decides on the features: the images, the clean view and the weights."""
    values = resolve_to_dict(source_cfg)
    dataset = values["dataset"]
    dataset["source"].pop("data_dir", None)  # where decoded images are kept says nothing of them
    for section in (dataset, dataset["source"]):
        section.pop("max_megapixels", None)  # nor does a limit say which images are below it
    return {
        "dataset": dataset,
        "images_sha256": fingerprint(images.fit),
        "paths_sha256": None if images.paths is None else sha256(json.dumps(images.paths).encode()).hexdigest(),
        "views": values["views"]["clean"],
        "weights_sha256": compute_checksum(network.state_dict()),
    }


def fingerprint(source: ImageSource, num_rows: int = 1000) -> str:
    """Return the SHA-256 of the number of images and of up to `num_rows` of them, evenly spread."""
    images = source.read(spread_positions(source, num_rows))
    if isinstance(images, PaddedImages):
        return compute_checksum({str(len(source)): images.pixels, "shapes": images.shapes})
    return compute_checksum({str(len(source)): images})


def prepare_folder(folder: Path) -> None:
    """Make the folder, and remove features of another kind: their labels and pictures would pass for the new ones'.

    Features whose making was stopped are removed by their journal, those of a folder without either are not ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_complete, is_begun = (folder / MADE_BY).is_file(), (folder / JOURNAL).is_file()
    if is_complete or is_begun:
        (folder / MADE_BY).unlink(missing_ok=True)  # first: a folder that loses files is not complete
        patterns = ("*_*.npy", "*_thumbnail*.bin", "*_paths.json", "class_names.json")
        for file in itertools.chain.from_iterable(map(folder.glob, patterns)):
            file.unlink(missing_ok=True)
        (folder / JOURNAL).unlink(missing_ok=True)


def write_data_set(
    folder: Path,
    images: ImageSet,
    encode_images: Callable[[Tensor | PaddedImages], Tensor],
    *,
    batch_size: int,
    max_pictures: int,
) -> None:
    """Write features, and what is known of the images, in the layout of `dataset=features`.

    A copy of the images, for reports to show, is written for up to `max_pictures` of them. The features of the split
    train are written last: without them the folder is no data set, so that half of one never passes for a whole one.
    """
    splits = {"train": images.fit} | ({} if images.evaluation is images.fit else {"test": images.evaluation})
    evaluated = list(splits)[-1]
    if images.labels is not None:
        write_labels(folder / f"{evaluated}_labels.npy", images.labels)
    if images.paths is not None:
        write_text(folder / f"{evaluated}_paths.json", json.dumps(images.paths))
    if images.class_names is not None:
        write_text(folder / "class_names.json", json.dumps(images.class_names))
    for split, source in splits.items():
        if len(source) <= max_pictures and source.shape[2] in (1, 3):
            write_pictures(folder, split, source, batch_size)
    for split, source in reversed(splits.items()):
        write_rows(folder / f"{split}_features.npy", source, encode_images, batch_size)


def write_pictures(folder: Path, split: str, source: ImageSource, batch_size: int) -> None:
    """Write a copy of all images of `source`, in the form of `deepclust.datasets.named_datasets`."""
    if source.shape[0] is not None:
        write_rows(folder / f"{split}_images.npy", source, channels_to_last, batch_size)
        return
    starts = range(0, len(source), batch_size)
    rows = (np.arange(start, min(start + batch_size, len(source))) for start in starts)
    chunks = (read_pictures(source, indices) for indices in rows)
    write_whole_images(folder, split, chunks, channels=source.shape[2], expected_area=0, total=len(source))


def channels_to_last(pixels: Any) -> Tensor:
    """Return images (N, C, H, W) as (N, H, W, C)."""
    return pixels.permute(0, 2, 3, 1)


@torch.no_grad()
def write_rows(
    file: Path, source: ImageSource, transform: Callable[[Tensor | PaddedImages], Tensor], batch_size: int
) -> None:
    """Write what `transform` makes of all images of `source`, in order, as the rows of a .npy file."""

    def transform_batches() -> Iterator[np.ndarray]:
        for start in track(range(0, len(source), batch_size), f"writing {file.name}"):
            indices = np.arange(start, min(start + batch_size, len(source)))
            yield transform(source.read(indices)).cpu().numpy()

    batches = transform_batches()
    first = next(batches)  # it tells the shape of a row
    write_array(
        file, itertools.chain([first], batches), row_shape=first.shape[1:], dtype=first.dtype, total=len(source)
    )
