"""`deepclust predict run=DIR images=FOLDER_OR_ARRAY output=FILE.csv`: clusters of new images with a trained run."""

import csv
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from deepclust.clustering.assignment_rules import assign_by_own_rule, assign_to_centroids
from deepclust.commands.predict_folders import check_sort_folder, shorten_name, sort_images
from deepclust.config.build import build
from deepclust.config.values import resolve_to_dict
from deepclust.datasets.array_files import open_array_file
from deepclust.datasets.image_decoding import convert_images, decode_in_chunks, find_image_files, find_value_ranges
from deepclust.datasets.image_formats import IMAGE_FORMATS, describe_passed_over
from deepclust.datasets.value_ranges import ValueRanges, describe_ranges, list_some
from deepclust.engine.csv_cells import path_cell
from deepclust.engine.devices import select_device
from deepclust.engine.output_files import (
    check_output_file,
    is_standard_output,
    is_written_through,
    replace_text_file,
    write_text,
)
from deepclust.engine.progress import track
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.runs.checkpoint import load_finished_checkpoint, load_method, stored_image_shape
from deepclust.runs.trusted_targets import split_trust
from deepclust.views.multiview import MultiView

log = logging.getLogger(__name__)

UNREADABLE_SUFFIX = ".unreadable.txt"  # of the list of files that cannot be read, after the name of the output


@dataclass
class ImageChunk:
    """Some of the images to predict, in order."""

    images: np.ndarray  # uint8 (n, H, W, channels), without those that cannot be read
    paths: list[str] | None  # one for each image; None for the rows of an array
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)


def main(cfg: DictConfig) -> None:
    """Write one line an image, in order: index, cluster, confidence, distance and, for files, path.

    `distance` is the Euclidean distance of the features to the mean of the training images in that cluster. Files that
    cannot be read are listed in OUTPUT.unreadable.txt and left out. With `sort_to` every file is also copied into one
    folder per cluster. The file and these folders are all complete in the end, or none of them is there.

    Raises:
        InputError: if the run, the images or the output cannot be used; it names the key to change.
    """
    output, sort_to = Path(cfg.output), None if cfg.sort_to is None else Path(cfg.sort_to)
    check_output_file(output, key="output")
    if sort_to is not None:
        check_sort_folder(sort_to)
    # Standard output may be the output; then nothing else is written there.
    with redirect_stdout(sys.stderr) if is_standard_output(output) else nullcontext():
        predict(cfg, output, sort_to)


def predict(cfg: DictConfig, output: Path, sort_to: Path | None) -> None:
    """Predict the clusters of all images, write them into `output`, and sort the files into `sort_to` if it is given.

    Raises:
        InputError: if the run or the images cannot be used.
    """
    checkpoint = load_finished_checkpoint(Path(cfg.run))
    run_cfg, method = load_method(checkpoint, trust=split_trust(cfg.trust))
    image_size, channels = stored_image_shape(run_cfg)
    if image_size == 1 or channels not in (1, 3):
        raise InputError(
            f"{cfg.run} clusters vectors of {channels} numbers",
            expected="a run on images",
            do="run deepclust cluster images=DIR num_clusters=K, which joins network and clusters in one run, "
            "or deepclust export for a file that takes vectors",
        )
    method.to(select_device(cfg.accelerator))
    views = build(run_cfg.multi_view)
    chunks = read_chunks(
        Path(cfg.images),
        image_size=image_size,
        channels=channels,
        value_ranges=resolve_to_dict(run_cfg)["dataset"].get("value_ranges"),
        max_megapixels=cfg.max_megapixels,
        batch_size=cfg.batch_size,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    num_written, unreadable = 0, []
    with sort_images(sort_to, link=cfg.link) as sorted_images, replace_text_file(output) as file:
        writer = csv.writer(file)
        for number, chunk in enumerate(chunks):
            if number == 0:
                path_column = [] if chunk.paths is None else ["path"]
                writer.writerow(["index", "cluster", "confidence", "distance", *path_column])
            unreadable += chunk.unreadable
            if len(chunk.images) == 0:
                continue
            clusters, confidences, distances = predict_clusters(chunk.images, method, views, checkpoint)
            rows = zip(clusters.tolist(), confidences.tolist(), distances.tolist(), strict=True)
            for row, (cluster, confidence, distance) in enumerate(rows):
                index, path = num_written + row, None if chunk.paths is None else chunk.paths[row]
                values = [index, cluster, f"{confidence:.6f}", f"{distance:.6g}"]
                writer.writerow(values if path is None else [*values, path_cell(path)])
                if sorted_images is not None:
                    sorted_images.add(path, cluster, index=index)
            num_written += len(chunk.images)
        if not num_written:
            raise InputError(
                f"none of the {len(unreadable)} files in {cfg.images} can be read as an image "
                f"(the first: {unreadable[0][1]})",
                expected=f"images ({', '.join(IMAGE_FORMATS)})",
                do="name another folder with images=DIR",
            )
        list_unreadable(output, unreadable)
        if sorted_images is not None:
            file.flush()
            os.fsync(file.fileno())  # before the folder gets its place: what does not fit on the disk is known by now
            sorted_images.move_into_place()
    print(f"{num_written} images: {output}")
    if sort_to is not None:
        print(f"one folder per cluster: {sort_to}")


@torch.no_grad()
def predict_clusters(
    images: np.ndarray, method: ClusteringMethod, views: MultiView, checkpoint: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return clusters (n,), confidences (n,) and distances (n,) of uint8 images (n, H, W, channels).

    The method's own rule assigns, else k-means of the checkpoint. A distance is nan for a cluster that held no training
    image.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(method.device)
    features = method.encode_all([views.clean(pixels)], len(images))
    clusters, confidences = assign_by_own_rule(method.cluster_logits, features) or assign_to_centroids(
        features, checkpoint["kmeans_centroids"].to(features), checkpoint["kmeans_scale"].to(features)
    )
    cluster_means = checkpoint["cluster_means"].to(method.device)
    return clusters, confidences, (features - cluster_means[clusters]).norm(dim=1)


def list_unreadable(output: Path, unreadable: list[tuple[str, str]]) -> None:
    """Write the files that could not be read, with reasons, beside the output. A list of an earlier call is removed.

    Where the output is no regular file, they are printed.
    """
    lines = [f"{path_cell(path)}\t{reason}\n" for path, reason in unreadable]
    if is_written_through(output):
        print("".join(f"could not be read: {line}" for line in lines), end="")
        return
    file = output.with_name(shorten_name(output.name + UNREADABLE_SUFFIX))
    file.unlink(missing_ok=True)
    if lines:
        write_text(file, "".join(lines))
        print(f"could not be read: {len(lines)}, listed in {file}")


def read_chunks(
    images: Path,
    *,
    image_size: int,
    channels: int,
    value_ranges: ValueRanges | None,
    max_megapixels: float,
    batch_size: int,
) -> Iterator[ImageChunk]:
    """Read a folder, a file or an array of images in chunks, brought to `image_size` and `channels`.

    Values of more than 8 bits are scaled by `value_ranges`, those of the training images, where they say something.
    Files of the folder that are passed over are named in a line.

    Raises:
        InputError: if there is nothing of the kind.
    """
    if images.suffix in (".npy", ".npz"):
        array, _ = open_array_file(str(images), value_ranges)
        for start in track(range(0, len(array), batch_size), "predicting"):
            rows = array[start : start + batch_size]
            yield ImageChunk(convert_images(rows, image_size=image_size, channels=channels), None)
        return
    if images.is_file():
        files = [str(images)]
    elif images.is_dir():
        found, passed_over = find_image_files(images)
        files = [str(images / name) for name, _, _ in found]
        if passed_over:
            print(f"passed over: {describe_passed_over(passed_over)}")
    else:
        raise InputError(
            f"{images} does not exist", expected="a folder, an image file or an array", do="set images=DIR"
        )
    if not files:
        raise InputError(f"{images} holds no image file", expected="images", do="name another folder with images=DIR")
    ranges, outside = find_value_ranges(files, value_ranges, max_megapixels=max_megapixels)
    if own_ranges := {kind: pair for kind, pair in ranges.items() if kind not in (value_ranges or {})}:
        log.info("unlike the training images; scaled to 0 to 255: %s", describe_ranges(own_ranges))
    if outside:
        log.warning(
            "%d of %d files hold values outside %s, the range of the training images; they are clipped: %s",
            *(len(outside), len(files), describe_ranges(ranges), list_some(outside)),
        )
    for start in track(range(0, len(files), batch_size), "predicting"):
        batch = files[start : start + batch_size]
        for paths, pixels, unreadable in decode_in_chunks(
            batch, image_size=image_size, channels=channels, value_ranges=ranges, max_megapixels=max_megapixels
        ):
            yield ImageChunk(pixels, paths, unreadable)
