"""`deepclust predict run=DIR images=FOLDER_OR_ARRAY output=FILE.csv`: clusters of new images with a trained run."""

import csv
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from deepclust.clustering.assignment_rules import assign_by_own_rule, assign_to_centroids
from deepclust.config.build import build
from deepclust.datasets.array_files import open_array_file
from deepclust.datasets.image_decoding import IMAGE_FORMATS, decode_in_chunks, find_image_files
from deepclust.datasets.image_sources import ArraySource
from deepclust.engine.devices import select_device
from deepclust.engine.progress import track
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.runs.checkpoint import load_finished_checkpoint, load_method, stored_image_shape
from deepclust.views.multiview import MultiView


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
    folder per cluster.

    Raises:
        InputError: if the run or the images cannot be used; it names the key to change.
    """
    if cfg.sort_to is not None:
        check_empty(Path(cfg.sort_to))
    checkpoint = load_finished_checkpoint(Path(cfg.run))
    run_cfg, method = load_method(checkpoint)
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
    output = Path(cfg.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".writing")
    num_written, unreadable = 0, []
    with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        for number, chunk in enumerate(read_chunks(Path(cfg.images), image_size, channels, cfg.batch_size)):
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
                writer.writerow(values if path is None else [*values, path])
                if cfg.sort_to is not None:
                    sort_file(path, Path(cfg.sort_to) / f"cluster_{cluster:03d}", index=index, link=cfg.link)
            num_written += len(chunk.images)
    if not num_written:
        temporary.unlink()
        raise InputError(
            f"none of the {len(unreadable)} files in {cfg.images} can be read as an image",
            expected=f"images ({', '.join(IMAGE_FORMATS)})",
            do="name another folder with images=DIR",
        )
    os.replace(temporary, output)
    print(f"{num_written} images: {output}")
    if cfg.sort_to is not None:
        print(f"one folder per cluster: {cfg.sort_to}")
    write_unreadable_list(output.with_name(output.name + ".unreadable.txt"), unreadable)


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


def check_empty(folder: Path) -> None:
    """Refuse to sort into a folder that holds something: clusters of two calls would be mixed.

    Raises:
        InputError: unless it is empty or missing.
    """
    if (folder.is_dir() and any(folder.iterdir())) or folder.is_file():
        raise InputError(
            f"{folder} {'is a file' if folder.is_file() else 'is not empty'}",
            expected="a new or empty folder to sort into",
            do="set sort_to=DIR to another, or remove it",
        )


def sort_file(path: str | None, folder: Path, *, index: int, link: bool) -> None:
    """Copy a file, or link to it, into the folder of its cluster. Its name there begins with its index.

    Raises:
        InputError: if there is no file, for the rows of an array have none.
    """
    if path is None:
        raise InputError("the images are rows of an array", expected="image files to sort", do="leave sort_to out")
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(path).absolute()
    target = folder / f"{index:06d}_{source.name}"
    target.unlink(missing_ok=True)
    if link:
        target.symlink_to(source)
    else:
        shutil.copy2(source, target)


def write_unreadable_list(file: Path, unreadable: list[tuple[str, str]]) -> None:
    """Write the files that could not be read, with reasons. A list of an earlier call is removed."""
    file.unlink(missing_ok=True)
    if unreadable:
        text = "".join(f"{path}\t{reason}\n" for path, reason in unreadable)
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
        print(f"could not be read: {len(unreadable)}, listed in {file}")


def read_chunks(images: Path, image_size: int, channels: int, batch_size: int) -> Iterator[ImageChunk]:
    """Read a folder, a file or an array of images in chunks, brought to `image_size` and `channels`.

    Raises:
        InputError: if there is nothing of the kind.
    """
    if images.suffix in (".npy", ".npz"):
        array, _ = open_array_file(str(images))
        source = ArraySource([array], channels)
        for start in track(range(0, len(source), batch_size), "predicting"):
            rows = source.read(np.arange(start, min(start + batch_size, len(source))))
            yield ImageChunk(rows.permute(0, 2, 3, 1).numpy(), None)
        return
    if images.is_file():
        files = [str(images)]
    elif images.is_dir():
        files = [str(images / name) for name, _, _ in find_image_files(images)[0]]
    else:
        raise InputError(
            f"{images} does not exist", expected="a folder, an image file or an array", do="set images=DIR"
        )
    if not files:
        raise InputError(f"{images} holds no image file", expected="images", do="name another folder with images=DIR")
    for start in track(range(0, len(files), batch_size), "predicting"):
        batch = files[start : start + batch_size]
        for paths, pixels, unreadable in decode_in_chunks(batch, image_size=image_size, channels=channels):
            yield ImageChunk(pixels, paths, unreadable)
