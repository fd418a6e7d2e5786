"""`deepclust predict run=DIR images=FOLDER_OR_ARRAY output=FILE.csv`: clusters of new images with a trained run."""

import csv
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from deepclust.callbacks.evaluation import assign_by_own_rule, assign_to_centroids
from deepclust.config.build import build
from deepclust.datasets.array_files import open_array_file
from deepclust.datasets.image_decoding import FORMATS, read_images, scan
from deepclust.datasets.image_sources import ArraySource
from deepclust.engine.devices import select_device
from deepclust.engine.progress import track
from deepclust.errors import InputError
from deepclust.runs.checkpoint import load_finished_checkpoint, load_method

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Write one line an image, in order: index, cluster, confidence, distance and, for files, path.

    `distance` is the Euclidean one of the features to the mean of the training images in that cluster. Files that
    cannot be read are listed in OUTPUT.unreadable.txt and left out. With `sort_to` every file also gets into one
    folder per cluster there.
    """
    if cfg.sort_to is not None:
        check_empty(Path(cfg.sort_to))
    checkpoint = load_finished_checkpoint(Path(cfg.run))
    run_cfg, method = load_method(checkpoint)
    size, channels = stored_shape(run_cfg)
    if size == 1 or channels not in (1, 3):
        raise InputError(
            f"{cfg.run} clusters vectors of {channels} numbers",
            expected="a run on images",
            do="run deepclust cluster images=DIR num_clusters=K, which joins network and clusters in one run, "
            "or deepclust export for a file that takes vectors",
        )
    method.to(select_device(cfg.accelerator))
    multi_view = build(run_cfg.multi_view)
    means = checkpoint["cluster_means"].to(method.device)
    output, unreadable = Path(cfg.output), []
    output.parent.mkdir(parents=True, exist_ok=True)
    beside, done = output.with_name(output.name + ".writing"), 0
    with beside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        for number, (paths, images, broken) in enumerate(read(Path(cfg.images), size, channels, cfg.batch_size)):
            if number == 0:
                writer.writerow(["index", "cluster", "confidence", "distance", *(["path"] if paths else [])])
            unreadable += broken
            if len(images) == 0:
                continue
            clean = multi_view.clean(torch.from_numpy(images).permute(0, 3, 1, 2).to(method.device))
            features = method.encode_all([clean], len(images))
            own = assign_by_own_rule(method, features) or assign_to_centroids(
                features, checkpoint["kmeans_centroids"].to(features), checkpoint["kmeans_scale"].to(features)
            )
            distances = (features - means[own[0]]).norm(dim=1)  # nan for a cluster that held no training image
            values = zip(*(part.tolist() for part in (*own, distances)), strict=True)
            for row, (cluster, confidence, distance) in enumerate(values):
                path = paths[row : row + 1] if paths else []
                writer.writerow([done + row, cluster, f"{confidence:.6f}", f"{distance:.6g}", *path])
                if cfg.sort_to is not None:
                    put(path, Path(cfg.sort_to) / f"cluster_{cluster:03d}", index=done + row, link=cfg.link)
            done += len(images)
    if not done:
        beside.unlink()
        raise InputError(
            f"none of the {len(unreadable)} files in {cfg.images} can be read as an image",
            expected=f"images ({', '.join(FORMATS)})",
            do="name another folder with images=DIR",
        )
    os.replace(beside, output)
    print(f"{done} images: {output}")
    if cfg.sort_to is not None:
        print(f"one folder per cluster: {cfg.sort_to}")
    listed = output.with_name(output.name + ".unreadable.txt")
    listed.unlink(missing_ok=True)  # of an earlier call
    if unreadable:
        listed.write_text(
            "".join(f"{path}\t{reason}\n" for path, reason in unreadable), encoding="utf-8", errors="surrogateescape"
        )
        print(f"could not be read: {len(unreadable)}, listed in {listed}")


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


def put(paths: list[str], folder: Path, *, index: int, link: bool) -> None:
    """Copy a file, or link to it, into the folder of its cluster; its name is kept behind its index.

    Raises:
        InputError: without a file, for an array holds none.
    """
    if not paths:
        raise InputError("the images are rows of an array", expected="image files to sort", do="leave sort_to out")
    folder.mkdir(parents=True, exist_ok=True)
    source, target = Path(paths[0]).absolute(), folder / f"{index:06d}_{Path(paths[0]).name}"
    target.unlink(missing_ok=True)
    if link:
        target.symlink_to(source)
    else:
        shutil.copy2(source, target)


def stored_shape(run_cfg: DictConfig) -> tuple[int, int]:
    """Side in pixels and channels in which the run's own images are stored."""
    source = run_cfg.dataset.source
    stored = source.get("image_size") or (source.get("make") or {}).get("image_size")
    return stored or run_cfg.dataset.image_size, run_cfg.dataset.channels


def read(
    images: Path, size: int, channels: int, batch_size: int
) -> Iterator[tuple[list[str] | None, np.ndarray, list[tuple[str, str]]]]:
    """Chunks of (paths, or None for an array; uint8 (n, H, W, channels); unreadable files with reasons).

    Raises:
        InputError: where there is nothing of the kind.
    """
    if images.suffix in (".npy", ".npz"):
        array, _ = open_array_file(str(images))
        source = ArraySource([array], channels)
        for start in track(range(0, len(source), batch_size), "predicting"):
            rows = source.read(np.arange(start, min(start + batch_size, len(source))))
            yield None, rows.permute(0, 2, 3, 1).numpy(), []
        return
    if images.is_file():
        files = [str(images)]
    elif images.is_dir():
        files = [str(images / name) for name, _, _ in scan(images)[0]]
    else:
        raise InputError(
            f"{images} does not exist", expected="a folder, an image file or an array", do="set images=DIR"
        )
    if not files:
        raise InputError(f"{images} holds no image file", expected="images", do="name another folder with images=DIR")
    starts = range(0, len(files), batch_size)
    for start in track(starts, "predicting"):
        yield from read_images(files[start : start + batch_size], image_size=size, channels=channels)
