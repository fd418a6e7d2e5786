"""Image files decoded by worker processes, in order, beside what the main process does with the pixels."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from deepclust.datasets.image_decoding import UnreadableImage, decode_image
from deepclust.datasets.thumbnails import encode_thumbnail
from deepclust.datasets.value_ranges import ValueRanges
from deepclust.engine.worker_processes import begin_worker

FILES_PER_PIECE = 32  # decoded at a time by one process, which bounds the memory
PIECES_AHEAD = 2  # of each process
MAX_PROCESSES = 8


@dataclass(frozen=True)
class DecodedFiles:
    """Some files, in order. The arrays leave out those that cannot be read."""

    num_files: int
    pixels: np.ndarray  # uint8 (n, side, side, channels)
    thumbnails: list[bytes]  # n JPEGs
    positions: np.ndarray  # (n,) of these files among all
    unreadable: list[tuple[int, str]]  # (position, reason)


@dataclass(frozen=True)
class DecodedBatch:
    """Some images, in order, that the network sees at once."""

    pixels: np.ndarray  # uint8 (n, side, side, channels)
    thumbnails: list[bytes]
    num_files_done: int  # the position after the last of them among all files


class Pieces(Dataset[DecodedFiles]):
    """Pieces of a list of files, each decoded when it is asked for."""

    def __init__(
        self,
        paths: Sequence[str],
        *,
        first: int,
        image_size: int,
        channels: int,
        thumbnail_side: int,
        value_ranges: ValueRanges | None,
        max_megapixels: float | None,
    ) -> None:
        # One block of bytes: a million Python strings would be copied in every forked process.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.first = first
        self.form: dict[str, Any] = {"image_size": image_size, "channels": channels}
        self.form |= {"value_ranges": value_ranges, "max_megapixels": max_megapixels}
        self.thumbnail_side = thumbnail_side

    def __len__(self) -> int:
        return -(-(len(self.paths) - self.first) // FILES_PER_PIECE)

    def __getitem__(self, piece: int) -> DecodedFiles:
        start = self.first + piece * FILES_PER_PIECE
        stop = min(start + FILES_PER_PIECE, len(self.paths))
        images, positions, unreadable = [], [], []
        for position in range(start, stop):
            try:
                images.append(decode_image(os.fsdecode(self.paths[position]), **self.form))
                positions.append(position)
            except UnreadableImage as error:
                unreadable.append((position, str(error)))
        side, channels = self.form["image_size"], self.form["channels"]
        pixels = np.stack(images) if images else np.empty((0, side, side, channels), np.uint8)
        thumbnails = [encode_thumbnail(image, self.thumbnail_side) for image in images]
        return DecodedFiles(stop - start, pixels, thumbnails, np.array(positions, np.int64), unreadable)


def decode_in_processes(paths: Sequence[str], *, num_processes: int, **form: Any) -> Iterator[DecodedFiles]:
    """Decode image files as `decode_image` does, as central squares, piece by piece and in order.

    Args:
        paths: the files.
        num_processes: how many processes decode; 0: none but this one, as where processes cannot be forked.
        form: the further arguments of `Pieces`; `first` is the position of the file to begin with.
    """
    num_workers = num_processes if sys.platform == "linux" else 0
    loader = DataLoader(
        Pieces(paths, **form),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=keep_as_it_is,  # arrays travel through pipes: shared memory is small in many containers
        multiprocessing_context="fork" if num_workers else None,
        prefetch_factor=PIECES_AHEAD if num_workers else None,
        worker_init_fn=partial(begin_worker, os.getpid()) if num_workers else None,
        generator=torch.Generator(),  # else it would draw from the generator that others use
    )
    yield from loader


def keep_as_it_is(piece: Any) -> Any:
    return piece


def regroup(
    pieces: Iterable[DecodedFiles], unreadable: list[tuple[int, str]], batch_size: int
) -> Iterator[DecodedBatch]:
    """Yield the images of pieces in batches; add the files that cannot be read to `unreadable`."""
    pixels: list[np.ndarray] = []
    thumbnails: list[bytes] = []
    positions: list[int] = []

    def take(count: int) -> DecodedBatch:
        nonlocal pixels
        together = np.concatenate(pixels)
        batch = DecodedBatch(together[:count], thumbnails[:count], positions[count - 1] + 1)
        pixels = [together[count:]]
        del thumbnails[:count], positions[:count]
        return batch

    for piece in pieces:
        unreadable += piece.unreadable
        pixels.append(piece.pixels)
        thumbnails += piece.thumbnails
        positions += piece.positions.tolist()
        while len(positions) >= batch_size:
            yield take(batch_size)
    if positions:
        yield take(len(positions))


def count_free_processes() -> int:
    """Return how many processes decode where nobody has said: one for each CPU of this process, but for one."""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(num_cpus - 1, 1), MAX_PROCESSES)
