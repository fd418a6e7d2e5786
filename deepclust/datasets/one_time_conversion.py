"""Converting the original files of a data set, once, into arrays that are read memory-mapped.

A conversion is a function that fills an empty folder. `make_folder_once` runs it in a temporary folder, which gets its
name when the conversion is complete.
"""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from deepclust.batch import lay_on_side
from deepclust.datasets.image_decoding import (
    CHUNK_SIZE,
    Kept,
    StoredSize,
    check_kept,
    decode_in_chunks,
    find_image_files,
    find_value_ranges,
)
from deepclust.datasets.image_formats import describe_passed_over
from deepclust.datasets.value_ranges import ValueRanges, describe_ranges, list_some, write_ranges
from deepclust.engine.csv_cells import path_cell
from deepclust.engine.output_files import replace_text_file, write_array
from deepclust.engine.progress_bar import track
from deepclust.errors import InputError
from deepclust.number_types import PositiveInt

logger = logging.getLogger(__name__)


def make_folder_once(
    folder: Path,
    make: Callable[[Path], None],
    *,
    ready: Callable[[Path], bool],
    replaceable: Collection[str] = (),
) -> None:
    """Fill `folder` by calling `make`, unless it is `ready`; of several processes, one does it and the others wait.

    `make` fills a temporary folder beside `folder`, which is renamed at the end, so that `folder` is never incomplete.
    An existing folder that is not ready is replaced if it holds nothing but files that are named in `replaceable`.

    Raises:
        InputError: if the folder cannot be written, or holds anything else.
    """
    if ready(folder):
        return
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if ready(folder):
                return
            check_replaceable(folder, replaceable)
            for leftover in (new, old):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            new.mkdir()
            try:
                make(new)
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
            finally:
                for leftover in (new, old):
                    shutil.rmtree(leftover, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error})",
            expected="a data_dir that can be written and has enough space",
            do="set another data_dir=DIR",
        ) from error


def has_entries(folder: Path) -> bool:
    """Whether this is a folder that is not empty."""
    return folder.is_dir() and any(folder.iterdir())


def check_replaceable(folder: Path, names: Collection[str]) -> None:
    """Refuse to replace a folder in which anything but files of these names lies: it may be the user's.

    Raises:
        InputError: naming the folder and what lies in it.
    """
    if not folder.is_dir():
        return
    if foreign := [entry.name for entry in sorted(folder.iterdir()) if entry.name not in names or has_entries(entry)]:
        raise InputError(
            f"{folder} would be replaced and holds {list_some(foreign)}, which deepclust has not written",
            expected="a folder of its own for what deepclust keeps",
            do="set another data_dir=DIR, or move what is in it",
        )


def write_image_array(file: Path, chunks: Iterable[np.ndarray], *, shape: tuple[int, int, int], total: int) -> int:
    """Write chunks (n, H, W, C) of uint8 images, one after the other, as one .npy array (M, H, W, C); return M.

    `shape` is (H, W, C). `total` is the expected number of images, for the progress bar and for the space on the disk.
    """
    tracked = track(chunks, f"writing {file.name}", total, size=len)
    return write_array(file, tracked, row_shape=shape, dtype=np.uint8, total=total)


def write_whole_images(
    folder: Path, split: str, chunks: Iterable[Sequence[np.ndarray]], *, channels: int, expected_area: int, total: int
) -> int:
    """Write whole images, in their own shapes, as SPLIT_images.npy and SPLIT_shapes.npy; return how many there are.

    Each chunk is a list of uint8 images (height, width, channels). `total` is the expected number of images, and
    `expected_area` that of the pixels of one, for the progress bar and for the space on the disk that is taken first.
    """
    shapes: list[tuple[int, int]] = []
    file = folder / f"{split}_images.npy"

    def join_pixels() -> Iterator[np.ndarray]:
        for chunk in track(chunks, f"writing {file.name}", total, size=len):
            shapes.extend(image.shape[:2] for image in chunk)
            yield np.concatenate(
                [np.empty((0, channels), np.uint8), *(lay_on_side(i).reshape(-1, channels) for i in chunk)]
            )

    write_array(file, join_pixels(), row_shape=(channels,), dtype=np.uint8, total=total * expected_area)
    rows = np.array(shapes, np.int32).reshape(-1, 2)
    write_array(folder / f"{split}_shapes.npy", [rows], row_shape=(2,), dtype=rows.dtype, total=len(rows))
    return len(shapes)


def write_images(
    folder: Path, split: str, chunks: Iterable[Any], *, image_size: StoredSize, channels: int, keep: Kept, total: int
) -> int:
    """Write what `decode_readable_images` yields for a split, in the form that `keep` says; return the number."""
    if keep == "whole_images":
        area = 0 if image_size == "original" else image_size * image_size * 4 // 3  # as of most photographs
        return write_whole_images(folder, split, chunks, channels=channels, expected_area=area, total=total)
    assert image_size != "original"
    shape = (image_size, image_size, channels)
    return write_image_array(folder / f"{split}_images.npy", chunks, shape=shape, total=total)


def write_labels(file: Path, labels: np.ndarray) -> None:
    """Write labels (M,) as a .npy file."""
    write_array(file, [labels], row_shape=(), dtype=labels.dtype, total=len(labels))


def write_unreadable_list(folder: Path, unreadable: Sequence[tuple[str, str]]) -> None:
    """Write one line for each unreadable file, with the reason, into unreadable.txt in `folder`."""
    with replace_text_file(folder / "unreadable.txt") as out:
        out.writelines(f"{path_cell(path)}\t{reason}\n" for path, reason in unreadable)


def decode_readable_images(
    paths: Sequence[str],
    unreadable: list[tuple[str, str]],
    *,
    image_size: StoredSize,
    channels: int,
    keep: Kept,
    value_ranges: ValueRanges,
    max_megapixels: float | None = None,
) -> Iterator[Any]:
    """Yield the images of files in chunks, in the form of `decode_in_chunks`.

    Files that cannot be read are added to `unreadable` with the reason.
    """
    for _, images, failed in decode_in_chunks(
        paths,
        image_size=image_size,
        channels=channels,
        keep=keep,
        value_ranges=value_ranges,
        max_megapixels=max_megapixels,
    ):
        unreadable += failed
        yield images


# From torchvision -------------------------------------------------------------------------------------------


def from_torchvision(
    work: Path, *, dataset: str, splits: Mapping[str, Mapping[str, Any]], root: str, download: bool
) -> None:
    """Write the splits of a data set of torchvision as arrays into the folder `work`.

    Args:
        work: an empty folder.
        dataset: the name of the class in torchvision.datasets.
        splits: for each split, the arguments of this class.
        root: the folder of the original files.
        download: whether missing original files are downloaded into `root`.

    Raises:
        InputError: if the files are not in `root` and may not or cannot be downloaded.
    """
    from torchvision import datasets  # imported here because it takes a second and is needed only once

    for split, arguments in splits.items():
        try:
            images = getattr(datasets, dataset)(Path(root).expanduser(), download=download, **arguments)
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"the download failed ({error})" if download else f"the files for torchvision are not in {root}",
                expected="a network connection" if download else "its files in this folder, or dataset.download=true",
                do="try again" if download else "download them once with dataset.download=true",
            ) from error
        labels: list[int] = []
        shape = pil_to_array(images[0][0]).shape
        write_image_array(work / f"{split}_images.npy", read_in_chunks(images, labels), shape=shape, total=len(images))
        if max(labels) >= 0:  # STL-10 marks its unlabelled images with -1
            write_labels(work / f"{split}_labels.npy", np.array(labels, np.int64))
            names = getattr(images, "classes", None) or range(max(labels) + 1)
            (work / "class_names.json").write_text(json.dumps([str(name) for name in names]) + "\n")


def pil_to_array(image: Any) -> np.ndarray:
    """Return a PIL image as uint8 (H, W, channels)."""
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def read_in_chunks(images: Any, labels: list[int]) -> Iterator[np.ndarray]:
    """Yield the images of a torchvision data set in chunks (n, H, W, channels) and add their labels to `labels`."""
    for start in range(0, len(images), CHUNK_SIZE):
        pairs = [images[i] for i in range(start, min(start + CHUNK_SIZE, len(images)))]
        labels += [int(label) for _, label in pairs]
        yield np.stack([pil_to_array(image) for image, _ in pairs])


# From folders of classes ------------------------------------------------------------------------------------


def from_class_folders(
    work: Path,
    *,
    root: str | None,
    splits: Sequence[str],
    classes: Mapping[str, str] | None,
    num_classes: PositiveInt,
    image_size: StoredSize,
    channels: PositiveInt,
    keep: Kept = "central_squares",
) -> None:
    """Write the images in ROOT/SPLIT/CLASS/**/FILE as arrays into `work`, in the form of `load_arrays`.

    Their short side is `image_size`; `keep` says whether whole images are kept, or squares.

    `classes` gives the class folders to take and the names of their classes; None takes all folders, with their own
    names.

    Raises:
        InputError: if a folder is missing or the number of classes is not `num_classes`.
    """
    check_kept(image_size, keep)
    unreadable: list[tuple[str, str]] = []
    found = {split: find_class_files(root, split, classes=classes, num_classes=num_classes) for split in splits}
    value_ranges, _ = find_value_ranges([path for paths, _, _ in found.values() for path in paths], None)
    write_ranges(work, value_ranges)
    if value_ranges:
        logger.info("of more than 8 bits, and scaled to 0 to 255: %s", describe_ranges(value_ranges))
    for split, (paths, labels, names) in found.items():
        failed: list[tuple[str, str]] = []
        chunks = decode_readable_images(
            paths, failed, image_size=image_size, channels=channels, keep=keep, value_ranges=value_ranges
        )
        write_images(work, split, chunks, image_size=image_size, channels=channels, keep=keep, total=len(paths))
        failed_paths = {path for path, _ in failed}
        is_readable = np.array([path not in failed_paths for path in paths])
        write_labels(work / f"{split}_labels.npy", labels[is_readable])
        (work / "class_names.json").write_text(json.dumps(names) + "\n")
        unreadable += failed
    if unreadable:
        write_unreadable_list(work, unreadable)
        logger.warning(
            "%d image files below %s could not be read and are left out; unreadable.txt lists them",
            *(len(unreadable), root),
        )


def find_class_files(
    root: str | None, split: str, *, classes: Mapping[str, str] | None, num_classes: int
) -> tuple[list[str], np.ndarray, list[str]]:
    """Return paths and labels (M,) of the image files below ROOT/SPLIT/CLASS, by class and name, and the class names.

    Raises:
        InputError: if a folder is missing or holds no image file, or the number of classes is not `num_classes`.
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
            f"{folder} is not a folder",
            expected="a folder of class folders",
            do="set dataset.root=DIR to the folder above it",
        )
    existing = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    chosen = list(existing if classes is None else classes)
    missing = sorted(set(chosen) - set(existing))
    if missing or len(chosen) != num_classes:
        without = f" without {' '.join(missing)}" if missing else ""
        raise InputError(
            f"{folder} holds {len(existing)} class folders{without}",
            expected=f"{num_classes} classes" + ("" if classes is None else f", {' '.join(chosen)}"),
            do="set dataset.root=DIR to a complete copy",
        )
    paths: list[str] = []
    labels: list[int] = []
    passed_over: Counter[str] = Counter()
    for label, name in enumerate(chosen):
        files, other_counts = find_image_files(folder / name)
        passed_over += other_counts
        if not files:
            raise InputError(
                f"{folder / name} holds no image file",
                expected="the images of a class",
                do="set dataset.root=DIR to a complete copy",
            )
        paths += [str(folder / name / path) for path, _, _ in files]
        labels += [label] * len(files)
    if passed_over:
        logger.info("files in %s are passed over: %s", folder, describe_passed_over(passed_over))
    names = chosen if classes is None else [classes[name] for name in chosen]
    return paths, np.array(labels, np.int64), names
