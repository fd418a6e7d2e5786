"""Original files to the stored form of a data set, once: arrays that are read memory-mapped.

A conversion is a function that fills an empty folder; `make_once` gives the folder its name when it is whole.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from deepclust.datasets.image_decoding import CHUNK, read_images, scan
from deepclust.engine.progress import track
from deepclust.errors import InputError

logger = logging.getLogger(__name__)


def make_once(folder: Path, make: Callable[[Path], None], *, ready: Callable[[Path], bool]) -> None:
    """Have `make` fill `folder` unless it is `ready`; of several processes one does it and the others wait.

    The work is done in a folder beside it that is renamed when it is whole, so `folder` never holds half of
    it. What it held before is replaced.

    Raises:
        InputError: the folder cannot be written.
    """
    if ready(folder):
        return
    work, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if ready(folder):
                return
            for leftover in (work, old):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            work.mkdir()
            try:
                make(work)
                if folder.exists():
                    folder.rename(old)
                work.rename(folder)
            finally:
                for leftover in (work, old):
                    shutil.rmtree(leftover, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error})",
            expected="a data_dir that can be written, with room",
            do="set another data_dir=DIR",
        ) from error


def write_images(file: Path, chunks: Iterable[np.ndarray], *, shape: tuple[int, int, int], total: int) -> int:
    """Write chunks (n, H, W, C) of uint8, each as it comes, as one .npy array (M, H, W, C); return M.

    `shape` is (H, W, C); `total` images are expected, for the show of progress only.
    """
    count = 0
    with open(file, "wb") as out:
        write_header(out, (0, *shape))
        for chunk in track(chunks, f"writing {file.name}", total, size=len):
            out.write(chunk.tobytes())
            count += len(chunk)
        out.seek(0)
        write_header(out, (count, *shape))
    return count


def write_header(out: Any, shape: tuple[int, ...]) -> None:
    # numpy pads the header for a first dimension of any length, so that it can be written again over itself.
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})


def write_unreadable(folder: Path, unreadable: Sequence[tuple[str, str]]) -> None:
    """List files and why they cannot be read, a line each, in unreadable.txt."""
    with open(folder / "unreadable.txt", "w", encoding="utf-8", errors="surrogateescape") as out:
        out.writelines(f"{path}\t{reason}\n" for path, reason in unreadable)


def read_collecting(
    paths: Sequence[str], unreadable: list[tuple[str, str]], *, image_size: int, channels: int
) -> Iterator[np.ndarray]:
    """Chunks of the images that can be read; the others are added to `unreadable`."""
    for _, images, failed in read_images(paths, image_size=image_size, channels=channels):
        unreadable += failed
        yield images


# From torchvision -------------------------------------------------------------------------------------------


def from_torchvision(
    work: Path, *, dataset: str, splits: Mapping[str, Mapping[str, Any]], root: str, download: bool
) -> None:
    """Write the splits of a data set of torchvision as arrays.

    `dataset` names its class, `splits` gives the class's arguments for each split, and `root` is the folder
    where its own files lie or are put.

    Raises:
        InputError: its files are not in `root` and may not or cannot be downloaded.
    """
    from torchvision import datasets  # takes a second, and is needed once

    for split, arguments in splits.items():
        try:
            images = getattr(datasets, dataset)(Path(root).expanduser(), download=download, **arguments)
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"the download failed ({error})" if download else f"torchvision's files are not in {root}",
                expected="a network" if download else "its files there, or dataset.download=true",
                do="try again" if download else "let them be fetched once with dataset.download=true",
            ) from error
        labels: list[int] = []
        shape = pixels(images[0][0]).shape
        write_images(work / f"{split}_images.npy", stack(images, labels), shape=shape, total=len(images))
        if max(labels) >= 0:  # STL-10 marks its unlabelled images with -1
            np.save(work / f"{split}_labels.npy", np.array(labels, np.int64))
            names = getattr(images, "classes", None) or range(max(labels) + 1)
            (work / "class_names.json").write_text(json.dumps([str(name) for name in names]) + "\n")


def pixels(image: Any) -> np.ndarray:
    """A PIL image as uint8 (H, W, channels)."""
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def stack(images: Any, labels: list[int]) -> Iterator[np.ndarray]:
    """Chunks of the images of a torchvision data set; their labels are added to `labels`."""
    for start in range(0, len(images), CHUNK):
        pairs = [images[i] for i in range(start, min(start + CHUNK, len(images)))]
        labels += [int(label) for _, label in pairs]
        yield np.stack([pixels(image) for image, _ in pairs])


# From folders of classes ------------------------------------------------------------------------------------


def from_class_folders(
    work: Path,
    *,
    root: str | None,
    splits: Sequence[str],
    classes: Mapping[str, str] | None,
    num_classes: int,
    image_size: int,
    channels: int,
) -> None:
    """Write the splits of ROOT/SPLIT/CLASS/**/FILE as arrays of images (image_size, image_size, channels).

    `classes` gives the folders that count, and their names; None takes them all under their own.

    Raises:
        InputError: a folder is missing, or the number of classes is not `num_classes`.
    """
    unreadable: list[tuple[str, str]] = []
    for split in splits:
        paths, labels, names = class_files(root, split, classes=classes, num_classes=num_classes)
        failed: list[tuple[str, str]] = []
        chunks = read_collecting(paths, failed, image_size=image_size, channels=channels)
        shape = (image_size, image_size, channels)
        write_images(work / f"{split}_images.npy", chunks, shape=shape, total=len(paths))
        left_out = {path for path, _ in failed}
        kept = np.array([path not in left_out for path in paths])
        np.save(work / f"{split}_labels.npy", labels[kept])
        (work / "class_names.json").write_text(json.dumps(names) + "\n")
        unreadable += failed
    if unreadable:
        write_unreadable(work, unreadable)
        logger.warning(
            "%d image files below %s could not be read and are left out; unreadable.txt lists them",
            *(len(unreadable), root),
        )


def class_files(
    root: str | None, split: str, *, classes: Mapping[str, str] | None, num_classes: int
) -> tuple[list[str], np.ndarray, list[str]]:
    """Paths of the image files below ROOT/SPLIT by class and name, labels (M,), and the classes' names.

    Raises:
        InputError: a folder is missing, holds no image file, or the number of classes is not `num_classes`.
    """
    if root is None:
        raise InputError(
            "dataset.root is not set",
            expected="a folder of image files",
            do=f"set dataset.root=DIR to the folder above {split}/CLASS/IMAGE",
        )
    folder = Path(root).expanduser().absolute() / split
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder",
            expected="the class folders in it",
            do="set dataset.root=DIR to the folder above it",
        )
    found = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    wanted = list(found if classes is None else classes)
    missing = sorted(set(wanted) - set(found))
    if missing or len(wanted) != num_classes:
        without = f" without {' '.join(missing)}" if missing else ""
        raise InputError(
            f"{folder} holds {len(found)} class folders{without}",
            expected=f"{num_classes} classes" + ("" if classes is None else f", {' '.join(wanted)}"),
            do="set dataset.root=DIR to a complete copy",
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(wanted):
        files, _ = scan(folder / name)
        if not files:
            raise InputError(
                f"{folder / name} holds no image file",
                expected="the images of a class",
                do="set dataset.root=DIR to a complete copy",
            )
        paths += [str(folder / name / path) for path, _, _ in files]
        labels += [label] * len(files)
    names = wanted if classes is None else [classes[name] for name in wanted]
    return paths, np.array(labels, np.int64), names
