"""New images or vectors for a trained model, read in chunks from folders, files, lists of files and arrays."""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.datasets.array_files import read_array_file, scale_images
from deepclust.datasets.features import convert_vectors, read_vector_file, read_vector_folder
from deepclust.datasets.image_decoding import convert_images, decode_in_chunks, find_image_files, find_value_ranges
from deepclust.datasets.image_formats import describe_passed_over
from deepclust.datasets.image_lists import is_image_list, read_image_list
from deepclust.datasets.input_paths import ARRAY_SUFFIXES
from deepclust.datasets.value_ranges import describe_ranges, list_some
from deepclust.engine.progress_bar import track
from deepclust.errors import InputError
from deepclust.runs.inputs_in_memory import (
    is_list_of_paths,
    is_list_of_pictures,
    is_path,
    list_paths,
    to_array,
    write_pictures,
)
from deepclust.runs.trained_model import TrainedModel

log = logging.getLogger(__name__)


@dataclass
class ImageChunk:
    """Some of the images to predict, in order."""

    # uint8 (n, H, W, channels), whole ones in their own shapes, or float32 vectors (n, D); without unreadable ones
    images: np.ndarray | list[np.ndarray]
    paths: list[str] | None  # one for each image; None for the rows of an array
    positions: np.ndarray  # (n,) of these images among all that were asked for
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)


def read_chunks(
    images: Path | Sequence[str] | np.ndarray, model: TrainedModel, *, max_megapixels: float, batch_size: int
) -> Iterator[ImageChunk]:
    """Read what a model is to predict, in chunks, as it takes them.

    `images` is a folder, an image file, an array file, a text file with the path of an image on each line, a list of
    image files, or an array: images (M, H, W[, channels]), or vectors (M, D) for a model on vectors. Values of more
    than 8 bits are scaled as those of the training images were. Files of a folder that are passed over are named in a
    line.

    Raises:
        InputError: if there is nothing of the kind, or it does not fit the model.
    """
    if model.is_on_vectors:
        yield from read_vector_chunks(images, model, batch_size)
    elif isinstance(images, np.ndarray):
        yield from read_array_chunks(Path("images"), images, model, batch_size)
    elif not isinstance(images, Path):
        yield from read_file_chunks(images, model, max_megapixels, batch_size)
    elif images.suffix in ARRAY_SUFFIXES:
        yield from read_array_chunks(images, read_array_file(images)[0], model, batch_size)
    else:
        yield from read_file_chunks(list_files(images), model, max_megapixels, batch_size)


def read_vector_chunks(
    vectors: Path | Sequence[str] | np.ndarray, model: TrainedModel, batch_size: int
) -> Iterator[ImageChunk]:
    """Read vectors (M, D) from an array, an array file or a folder of the layout of `dataset=features`.

    Raises:
        InputError: if they are no vectors, or do not have as many numbers as those of the run.
    """
    num_features, paths = model.image_shape[1], None
    if isinstance(vectors, np.ndarray):
        array, name = convert_vectors(vectors, "the array"), "the array"
    elif isinstance(vectors, Path) and vectors.suffix in ARRAY_SUFFIXES:
        array, name = read_vector_file(vectors), str(vectors)
    elif isinstance(vectors, Path) and any(vectors.glob("*_features.npy")):
        array, paths = read_vector_folder(vectors)
        name = str(vectors)
    else:
        found = vectors if isinstance(vectors, Path) else "a list of files"
        raise InputError(
            f"{model.run} clusters vectors of {num_features} numbers, and {found} holds none",
            expected=f"vectors: an array (M, {num_features}) in a .npy file, or a folder with *_features.npy",
            do="set images=FILE.npy, or run deepclust cluster images=DIR num_clusters=K, which joins network and "
            "clusters in one run",
        )
    if array.shape[1] != num_features:
        raise InputError(
            f"{name} holds vectors of {array.shape[1]} numbers",
            expected=f"{num_features}, as the run {model.run} was trained on",
            do="make them as those of the run were made",
        )
    for start in track(range(0, len(array), batch_size), "predicting"):
        rows = np.array(array[start : start + batch_size], np.float32)
        positions = np.arange(start, start + len(rows))
        yield ImageChunk(rows, None if paths is None else paths[start : start + batch_size], positions)


def read_array_chunks(name: Path, array: np.ndarray, model: TrainedModel, batch_size: int) -> Iterator[ImageChunk]:
    """Read images (M, H, W[, channels]); `name` is what an error calls them.

    Raises:
        InputError: if the array holds something else.
    """
    image_size, channels = model.image_shape
    array = scale_images(name, array, model.value_ranges)
    for start in track(range(0, len(array), batch_size), "predicting"):
        batch = array[start : start + batch_size]
        rows = convert_images(batch, image_size=image_size, channels=channels, keep=model.keep)
        yield ImageChunk(rows, None, np.arange(start, start + len(rows)))


def list_files(images: Path) -> list[str]:
    """Return the image files of a folder, those that a text file lists, or the one file.

    Raises:
        InputError: if there are none.
    """
    if is_image_list(images):
        return read_image_list(images)
    if images.is_file():
        return [str(images)]
    if not images.is_dir():
        raise InputError(
            f"{images} does not exist", expected="a folder, an image file or an array", do="set images=DIR"
        )
    found, passed_over = find_image_files(images)
    if passed_over:
        print(f"passed over: {describe_passed_over(passed_over)}")
    if not found:
        raise InputError(f"{images} holds no image file", expected="images", do="name another folder with images=DIR")
    return [str(images / name) for name, _, _ in found]


def read_file_chunks(
    files: Sequence[str], model: TrainedModel, max_megapixels: float, batch_size: int
) -> Iterator[ImageChunk]:
    """Read image files, brought to the size and the channels that the model takes."""
    image_size, channels = model.image_shape
    value_ranges = model.value_ranges
    ranges, outside = find_value_ranges(files, value_ranges, max_megapixels=max_megapixels)
    if own_ranges := {kind: pair for kind, pair in ranges.items() if kind not in (value_ranges or {})}:
        log.info("unlike the training images; scaled to 0 to 255: %s", describe_ranges(own_ranges))
    if outside:
        log.warning(
            "%d of %d files hold values outside %s, the range of the training images; they are clipped: %s",
            *(len(outside), len(files), describe_ranges(ranges), list_some(outside)),
        )
    first = 0  # the position of the first file of a chunk
    for start in track(range(0, len(files), batch_size), "predicting"):
        batch = files[start : start + batch_size]
        for paths, pixels, unreadable in decode_in_chunks(
            batch,
            image_size=image_size,
            channels=channels,
            keep=model.keep,
            value_ranges=ranges,
            max_megapixels=max_megapixels,
        ):
            names, num_files = {path for path, _ in unreadable}, len(paths) + len(unreadable)
            positions = [p for p in range(first, first + num_files) if files[p] not in names]
            first += num_files
            yield ImageChunk(pixels, paths, np.array(positions, np.int64), unreadable)


@contextmanager
def open_new_images(
    images: Any, model: TrainedModel, *, max_megapixels: float, batch_size: int
) -> Iterator[tuple[Iterator[ImageChunk], list[str] | None]]:
    """Give new images or vectors from disk or from memory in chunks, and their files where they are files.

    Raises:
        InputError: if there are none, or they do not fit the model.
    """
    read = partial(read_chunks, model=model, max_megapixels=max_megapixels, batch_size=batch_size)
    if is_path(images):
        path = Path(os.fsdecode(images)).expanduser()
        files = None if model.is_on_vectors or path.suffix in ARRAY_SUFFIXES else list_files(path)
        yield read(path if files is None else files), files
    elif is_list_of_paths(images):
        files = list_paths(images, "images")
        yield read(files), files
    elif is_list_of_pictures(images):
        with tempfile.TemporaryDirectory() as folder:
            yield read(write_pictures(images, Path(folder), "images")), None
    else:
        yield read(to_array(images, "images")), None
