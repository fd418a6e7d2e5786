"""The features of photos that are decoded as they are read: no decoded copy is kept, and what was killed goes on.

Worker processes decode the files and make thumbnails while the network runs. Features and thumbnails are written in
blocks, so that a second start loses the last one at most. The folder is a data set for `dataset=features`.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from deepclust.batch import PaddedImages
from deepclust.commands.features import (
    JOURNAL,
    MADE_BY,
    build_network,
    prepare_encoder,
    prepare_folder,
    read_made_by,
)
from deepclust.config.plain_values import resolve_to_dict
from deepclust.datasets.decoding_processes import DecodedFiles, decode_in_processes, regroup
from deepclust.datasets.folder import (
    find_images,
    log_what_was_found,
    name_below,
    name_key,
    none_readable_error,
    subfolder_labels,
)
from deepclust.datasets.image_decoding import find_value_ranges
from deepclust.datasets.image_sources import FileSource, ImageSet
from deepclust.datasets.one_time_conversion import write_labels, write_unreadable_list
from deepclust.datasets.thumbnails import ENDS, ENDS_TYPE, THUMBNAILS, open_thumbnails
from deepclust.datasets.value_ranges import check_ranges
from deepclust.engine.growing_files import GrowingFiles
from deepclust.engine.output_files import name_file_in_errors, write_array_header, write_text
from deepclust.engine.plurals import format_count
from deepclust.engine.progress_bar import ProgressMeter, announce
from deepclust.engine.small_files import MAX_BYTES_OF_LIST, read_json
from deepclust.errors import InputError
from deepclust.runs.checkpoint import compute_checksum

log = logging.getLogger(__name__)

FEATURES = "train_features.npy"
SECONDS_PER_BLOCK = 10.0  # at least; what a killed process loses
THUMBNAIL_SIDE, SMALL_THUMBNAIL_SIDE = 224, 112  # pixels; small ones from this many images on:
MANY_IMAGES = 10_001


@dataclass(frozen=True)
class PhotoFiles:
    """The image files of a folder or a list, before any of them is decoded."""

    root: Path
    files: list[list[Any]]  # [path below root, size in bytes, modification time in ns], in order

    @property
    def names(self) -> list[str]:
        """The paths below the root."""
        return [name for name, _, _ in self.files]


@dataclass
class Progress:
    """How far the features are: the state that a second start is given."""

    key: str  # of what makes the features
    files_sha256: str  # of the files that are done
    num_files: int = 0  # that are done
    num_images: int = 0  # of these, that could be read
    num_features: int = 0
    num_thumbnail_bytes: int = 0
    unreadable: list[tuple[int, str]] = field(default_factory=list)


def find_photos(dataset: dict[str, Any]) -> PhotoFiles:
    """Find the image files of the section `dataset`.

    Raises:
        InputError: if there are none.
    """
    root = Path(dataset["path"]).expanduser().absolute()
    return PhotoFiles(root, find_images(root))


def write_photo_features(
    cfg: DictConfig,
    photos: PhotoFiles,
    folder: Path,
    *,
    num_processes: int,
    thumbnail_side: int | None,
    on_first_block: Callable[[Tensor, float], None],
) -> ImageSet:
    """Write the features and thumbnails of photos, unless they are there already; return the images.

    Args:
        cfg: a configuration of `deepclust features` with a network and the section `dataset`.
        photos: the files.
        folder: what is written.
        num_processes: that decode files.
        thumbnail_side: in pixels; None: THUMBNAIL_SIDE, or SMALL_THUMBNAIL_SIDE of many images.
        on_first_block: called once with the features (N, D) of the first block and the seconds that one of these
            images took, unless all are there already.

    Raises:
        InputError: if no file can be read, or the disk has no room for what is written.
    """
    _, network, encode = build_network(cfg, cfg, None)
    side = thumbnail_side or (SMALL_THUMBNAIL_SIDE if len(photos.files) >= MANY_IMAGES else THUMBNAIL_SIDE)
    made_by = describe_what_makes_features(cfg, network, side)
    key = compute_key([made_by, hash_files(photos.files).hexdigest()])
    if read_made_by(folder) == key:
        return open_photos(cfg, photos, folder, read_json(folder / MADE_BY, max_bytes=MAX_BYTES_OF_LIST))
    source = made_by["dataset"]["source"]
    limit = source["max_megapixels"]
    paths = [str(photos.root / name) for name in photos.names]
    with announce("looking at the image files"):
        given = check_ranges(source["value_ranges"])
        ranges, outside = find_value_ranges(paths, given, max_megapixels=limit)
    encode_images = prepare_encoder(cfg, cfg, network, encode, lambda: make_example(source))
    form = {name: source[name] for name in ("image_size", "channels", "max_megapixels")}
    growing = GrowingFiles(folder, (FEATURES, f"train{THUMBNAILS}", f"train{ENDS}"), journal=JOURNAL)
    blocks_key = compute_key([made_by, ranges, cfg.batch_size, cfg.accelerator])
    progress = read_progress(growing, photos, blocks_key)
    if progress is None:
        prepare_folder(folder)
    progress = write_blocks(
        growing,
        progress or Progress(blocks_key, ""),
        photos,
        encode_images,
        batch_size=cfg.batch_size,
        decode=lambda first: decode_in_processes(
            paths, num_processes=num_processes, first=first, thumbnail_side=side, value_ranges=ranges, **form
        ),
        on_first_block=on_first_block,
    )
    made = made_by | {"value_ranges": ranges, "outside": outside, "unreadable": progress.unreadable}
    images = open_photos(cfg, photos, folder, made)
    write_what_is_known(folder, images)
    write_text(folder / MADE_BY, json.dumps({"sha256": key, **made}, indent=2) + "\n")
    (folder / JOURNAL).unlink(missing_ok=True)
    print(f"features of {format_count(len(images.fit), 'image')}: {folder}")
    return images


def describe_what_makes_features(cfg: DictConfig, network: torch.nn.Module, thumbnail_side: int) -> dict[str, Any]:
    """Return what decides on features and thumbnails beside the files: how these are decoded, view and weights."""
    values = resolve_to_dict(cfg)
    dataset = values["dataset"]
    dataset["source"].pop("data_dir", None)  # nothing is kept there
    return {
        "dataset": dataset,
        "thumbnail_side": thumbnail_side,
        "views": values["views"]["clean"],
        "weights_sha256": compute_checksum(network.state_dict()),
    }


def compute_key(made_of: Any) -> str:
    """Return the SHA-256 of what something is made of."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def hash_files(files: Iterable[list[Any]], digest: Any = None) -> Any:
    """Return the SHA-256 of files in order; `digest` is that of those before, which is carried on."""
    digest = hashlib.sha256() if digest is None else digest
    for file in files:
        digest.update(json.dumps(file).encode())
    return digest


def make_example(source: dict[str, Any]) -> Tensor:
    """Return one black image of the form in which photos are decoded."""
    return torch.zeros(1, source["channels"], source["image_size"], source["image_size"], dtype=torch.uint8)


def write_blocks(
    growing: GrowingFiles,
    progress: Progress,
    photos: PhotoFiles,
    encode_images: Callable[[Tensor | PaddedImages], Tensor],
    *,
    batch_size: int,
    decode: Callable[[int], Iterator[DecodedFiles]],
    on_first_block: Callable[[Tensor, float], None],
) -> Progress:
    """Write features and thumbnails block by block, from where `progress` has come to, and return it.

    `decode` gives the decoded files from a position on. Batches are the same wherever a start was stopped.

    Raises:
        InputError: if no file can be read, or the disk has no room for what is written.
    """
    growing.open(keep=progress.num_files > 0)
    if progress.num_files == 0:
        growing.commit(vars(progress))  # the journal marks what a start that ends at once has left
    else:
        log.info("going on from %d of %s", progress.num_files, format_count(len(photos.files), "file"))
    digest = hash_files(photos.files[: progress.num_files])
    meter = ProgressMeter("features", len(photos.files), done=progress.num_files)
    first_image, has_told, committed_at = progress.num_images, False, time.monotonic()
    started_at = committed_at
    unreadable: list[tuple[int, str]] = []
    try:
        for batch in regroup(decode(progress.num_files), unreadable, batch_size):
            features = encode_images(torch.from_numpy(batch.pixels).permute(0, 3, 1, 2)).cpu()
            if progress.num_images == 0:  # the length of a row is known now, their number at the end
                write_array_header(growing.files[FEATURES], (0, features.shape[1]), np.dtype(np.float32))
                progress.num_features = features.shape[1]
            growing.append(FEATURES, features.numpy().data)
            ends = progress.num_thumbnail_bytes + np.cumsum([len(jpeg) for jpeg in batch.thumbnails])
            growing.append(f"train{THUMBNAILS}", b"".join(batch.thumbnails))
            growing.append(f"train{ENDS}", ends.astype(ENDS_TYPE).data)
            hash_files(photos.files[progress.num_files : batch.num_files_done], digest)
            progress.num_files, progress.num_thumbnail_bytes = batch.num_files_done, int(ends[-1])
            progress.num_images += len(features)
            meter.update(progress.num_files)
            now = time.monotonic()
            if now - committed_at >= SECONDS_PER_BLOCK:
                commit(growing, progress, digest, unreadable)
                committed_at = now
            # The first batch is slower: processes start, and the network warms up.
            if not has_told and now - started_at >= SECONDS_PER_BLOCK / 2 and progress.num_images > first_image:
                check_room(growing, progress, len(photos.files))
                on_first_block(features, (now - started_at) / (progress.num_images - first_image))
                has_told = True
        hash_files(photos.files[progress.num_files :], digest)
        progress.num_files = len(photos.files)
        progress.unreadable += unreadable
        if progress.num_images == 0:
            raise none_readable_error(photos.root, len(photos.files), progress.unreadable[0][1])
        commit(growing, progress, digest, [])
    finally:
        meter.close()
        growing.close()
    with name_file_in_errors(growing.folder / FEATURES), (growing.folder / FEATURES).open("r+b") as file:
        write_array_header(file, (progress.num_images, progress.num_features), np.dtype(np.float32))
        file.flush()
        os.fsync(file.fileno())
    return progress


def read_progress(growing: GrowingFiles, photos: PhotoFiles, key: str) -> Progress | None:
    """Return how far an earlier start has come with the same key and files; None if it cannot be gone on from."""
    try:
        progress = Progress(**growing.read_state())
        progress.unreadable = [(int(position), str(reason)) for position, reason in progress.unreadable]
        digest = hash_files(photos.files[: progress.num_files]).hexdigest()
        return progress if (progress.key, progress.files_sha256) == (key, digest) else None
    except (TypeError, ValueError):  # there is no state, or it is something else
        return None


def commit(growing: GrowingFiles, progress: Progress, digest: Any, unreadable: list[tuple[int, str]]) -> None:
    """End a block. Of the files that could not be read, those of later batches are tried again by a second start."""
    done = [item for item in unreadable if item[0] < progress.num_files]
    state = vars(progress) | {"files_sha256": digest.hexdigest(), "unreadable": [*progress.unreadable, *done]}
    growing.commit(state)


def check_room(growing: GrowingFiles, progress: Progress, num_files: int) -> None:
    """Refuse to go on where the disk has no room for the features and thumbnails that are still to be written.

    Raises:
        InputError: with how much is missing.
    """
    bytes_per_image = 4 * progress.num_features + 8 + progress.num_thumbnail_bytes / progress.num_images
    needed = (num_files - progress.num_files) * bytes_per_image
    free = shutil.disk_usage(growing.folder).free
    if needed > free:
        raise InputError(
            f"{growing.folder} needs another {needed / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left",
            expected="room for features and thumbnails",
            do="make room, or set hydra.run.dir=DIR on another disk",
        )


def write_what_is_known(folder: Path, images: ImageSet) -> None:
    """Write paths, labels and names of classes beside the features, and the list of files that cannot be read."""
    write_text(folder / "train_paths.json", json.dumps(images.paths))
    if images.labels is not None:
        write_labels(folder / "train_labels.npy", images.labels)
        write_text(folder / "class_names.json", json.dumps(images.class_names))
    (folder / "unreadable.txt").unlink(missing_ok=True)
    if images.unreadable:
        write_unreadable_list(folder, [(path, reason) for _, path, reason in images.unreadable])


def open_photos(cfg: DictConfig, photos: PhotoFiles, folder: Path, made: dict[str, Any]) -> ImageSet:
    """Open the images whose features are complete: files that are decoded when they are read, and thumbnails.

    `made` is what made_by.json says of value ranges and of the files that could not be read.
    """
    reasons = {position: name_key(reason) for position, reason in made["unreadable"]}
    root, all_names = photos.root, photos.names
    names = [name for position, name in enumerate(all_names) if position not in reasons]
    source = resolve_to_dict(cfg)["dataset"]["source"]
    ranges = {kind: (float(low), float(high)) for kind, (low, high) in made["value_ranges"].items()}
    files = FileSource(
        [str(root / name) for name in names],
        image_size=source["image_size"],
        channels=source["channels"],
        num_workers=1,
        value_ranges=ranges,
        max_megapixels=source["max_megapixels"],
    )
    labels, class_names = subfolder_labels(root, names) if source["labelled"] else (None, None)
    log.info("%s of %s", format_count(len(names), "image"), root)
    unreadable = [(all_names[position], reason) for position, reason in reasons.items()]
    outside = [name_below(root, path) for path in made["outside"]]
    log_what_was_found(root, len(all_names), unreadable, folder / "unreadable.txt", ranges, outside)
    return ImageSet(
        files,
        files,
        labels=labels,
        class_names=class_names,
        paths=[str(root / name) for name in names],
        pictures=open_thumbnails(folder, "train", len(names)),
        value_ranges=ranges or None,
        unreadable=[(position, str(root / all_names[position]), reason) for position, reason in reasons.items()],
    )
