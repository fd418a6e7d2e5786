"""Data sets in tar shards, as the library webdataset writes them, read at random through an index that is made once.

In a shard, the files of an image follow one another and share a key: KEY.jpg is the image, KEY.cls its label as text,
and other files are passed over. The shards stay as they are. Their index is kept in
<data_dir>/webdataset-<hash of shards and extensions>:

    members.npy    int64 (M, 2): where in its shard each image begins, and how many bytes it has
    labels.npy     int64 (M,), if the images have labels
    keys.txt       for each image, in order: its shard, a tab, and its name there
    shards.json    the shards with sizes and modification times, and how many images each holds

An image is numbered by its place in the order of the shards. So each image is read by its number, like one in an array:
the order of an epoch, the shares of processes and going on in the middle of an epoch are those of all data sets. A
stream of shards would have none of this: it can only shuffle within a buffer, its order hangs on the number of
processes and workers, and a run that goes on would have to read what it had read before.
"""

import glob
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.datasets.encoded_images import EncodedImageSource
from deepclust.datasets.image_decoding import Kept, StoredSize
from deepclust.datasets.image_sources import ImageSet
from deepclust.datasets.labels import number_classes
from deepclust.datasets.mapped_arrays import check_not_cut_short, map_array
from deepclust.datasets.one_time_conversion import make_folder_once, write_labels
from deepclust.datasets.shard_index import check_all_labelled, index_shard
from deepclust.datasets.value_ranges import ValueRanges, check_ranges
from deepclust.engine.output_files import write_array
from deepclust.engine.plurals import format_count
from deepclust.engine.progress_bar import track
from deepclust.engine.small_files import MAX_BYTES_OF_LIST, read_json_object
from deepclust.errors import InputError
from deepclust.number_types import PositiveFloat, PositiveInt

logger = logging.getLogger(__name__)

BREAKS = {ord(character): "?" for character in "\t\r\n"}  # that would end a name in keys.txt


def load_webdataset(
    *,
    path: str | Sequence[str],
    evaluate: str | Sequence[str] | None,
    data_dir: str,
    image_extension: str | None,
    label_extension: str | None,
    image_size: StoredSize,
    channels: PositiveInt,
    keep: Kept,
    value_ranges: ValueRanges | None,
    max_megapixels: PositiveFloat | None,
    num_classes: PositiveInt | None,
    num_workers: PositiveInt,
) -> ImageSet:
    """Load the images of tar shards, which are decoded each time they are read; all of `path` are fitted.

    Args:
        path: the shards (see `find_shards`).
        evaluate: the shards that are evaluated; None evaluates the images of `path` (the merged protocol).
        data_dir: where the index is kept, until a shard is added, removed or changed.
        image_extension: what follows the key in the name of an image, such as jpg or left.png, in any case; None: each
            key has one image only.
        label_extension: what follows the key in the name of a label, in any case; None: the labels are left out.
        image_size: short side of the decoded images, as in `decode_image`; so are `channels` and `keep`.
        value_ranges: of values of more than 8 bits. Without them integers go from 0 to 65535 and floats from 0 to 1:
            the shards are not searched for the range of their values.
        max_megapixels: the largest image that is read, as in `decode_image`.
        num_classes: number of classes (see `number_classes`). Only if it is None may the labels be missing.
        num_workers: threads that read and decode.

    Raises:
        InputError: if a shard is missing or broken, or holds something else.
        ModuleNotFoundError: without the library webdataset.
    """
    ranges = check_ranges(value_ranges)
    form: dict[str, Any] = {"image_size": image_size, "channels": channels, "keep": keep}
    form |= {"value_ranges": ranges or None, "max_megapixels": max_megapixels, "num_workers": num_workers}
    open_index = partial(
        open_shards,
        data_dir=Path(data_dir).expanduser().absolute(),
        image_extension=normalize_extension(image_extension),
        label_extension=normalize_extension(label_extension),
        num_workers=num_workers,
    )
    shards = find_shards(path)
    fitted, labels = open_index(shards)
    fit = evaluation = EncodedImageSource(fitted, **form)
    if evaluate is not None:
        shards = find_shards(evaluate)
        evaluated, labels = open_index(shards)
        evaluation = EncodedImageSource(evaluated, **form)
    if labels is None and num_classes is not None:
        raise InputError(
            f"dataset.num_classes is {num_classes} and the shards hold no labels",
            expected=f"a file KEY.{label_extension or 'cls'} for each image",
            do="set dataset.label_extension to that of the labels, or dataset.num_classes=null dataset.num_clusters=K",
        )
    class_names = None
    if labels is not None:
        named = {shards[0].parent: labels}
        labels, class_names = number_classes(named, num_classes=num_classes, class_names=None)
    return ImageSet(fit, evaluation, labels=labels, class_names=class_names, value_ranges=ranges or None)


def normalize_extension(extension: str | None) -> str | None:
    """Return an extension in the form of those in shards: in lower case, without a dot before it."""
    return None if extension is None else extension.lower().removeprefix(".")


def find_shards(path: str | Sequence[str]) -> list[Path]:
    """Return the shards that `path` names, in order, which is that of the numbers of their images.

    `path` is a folder, of which all files NAME.tar are taken in alphabetical order, a pattern with {000..146} or *, or
    a list of these.

    Raises:
        InputError: if a shard is missing or not on this machine, or there is none.
        ModuleNotFoundError: without the library webdataset.
    """
    from webdataset.shardlists import expand_urls  # imported here because it takes a second

    found: list[Path] = []
    for pattern in [path] if isinstance(path, str) else path:
        if re.match(r"\w+://|pipe:", pattern):
            raise InputError(
                f"{pattern} is not on this machine",
                expected="shards on a disk or a shared file system, which are read at random",
                do="download them and set dataset.path=DIR",
            )
        folder = Path(pattern).expanduser().absolute()
        if folder.is_dir():
            files = sorted(file for file in folder.iterdir() if file.suffix == ".tar" and not file.name.startswith("."))
        else:
            expanded = [str(Path(name).expanduser().absolute()) for name in expand_urls(pattern)]
            files = [Path(file) for name in expanded for file in (sorted(glob.glob(name)) if "*" in name else [name])]
        if not files:
            raise InputError(
                f"{pattern} holds no shard" if folder.is_dir() else f"{pattern} names no shard",
                expected="files that end in .tar",
                do="set dataset.path=DIR to a folder of shards, or to a pattern such as 'DIR/train-{000..146}.tar'",
            )
        found += files
    if missing := [file for file in found if not file.is_file()]:
        raise InputError(
            f"{len(missing)} of {format_count(len(found), 'shard')} {'is' if len(missing) == 1 else 'are'} missing, "
            f"such as {missing[0]}",
            expected="all shards that dataset.path names",
            do="bring them here, or set dataset.path to those that are there",
        )
    if len(set(found)) < len(found):
        raise InputError(
            f"dataset.path names {next(file for file in found if found.count(file) > 1)} twice",
            expected="each shard once",
            do="correct dataset.path",
        )
    return found


class TarMembers:
    """Image files in tar shards, each read by itself.

    Args:
        shards: the paths of the shards.
        counts: how many images each of them holds.
        members: for each image, where it begins in its shard and how many bytes it has (M, 2); memory-mapped.
        keys: the file with a line for each image, which says what it is called.
    """

    def __init__(self, shards: Sequence[str], counts: Sequence[int], members: np.ndarray, keys: Path) -> None:
        self.shards, self.members, self.keys = list(shards), members, keys
        self.ends = np.cumsum(counts)  # of the images of each shard, among all

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> bytes:
        check_not_cut_short(self.members)
        shard = self.shards[int(np.searchsorted(self.ends, index, side="right"))]
        start, size = self.members[index].tolist()
        try:
            # Opened for each image: there may be more shards than files that a process may hold open.
            with open(shard, "rb", buffering=0) as opened:
                content = os.pread(opened.fileno(), size, start)
        except OSError as error:
            raise self._changed_error(shard, str(error)) from error
        if len(content) != size:
            raise self._changed_error(shard, "it has become shorter")
        return content

    def _changed_error(self, shard: str, reason: str) -> InputError:
        return InputError(
            f"{shard} cannot be read: {reason}",
            expected="a shard that stays as it was when the run began",
            do="bring it back and start the same command again: training goes on from the last checkpoint",
        )

    def name(self, index: int) -> str:
        with open(self.keys, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            shard, _, name = next(itertools.islice(lines, index, None)).rstrip("\n").partition("\t")
        return f"{name} in {shard}"


# The index --------------------------------------------------------------------------------------------------


def open_shards(
    shards: Sequence[Path],
    *,
    data_dir: Path,
    image_extension: str | None,
    label_extension: str | None,
    num_workers: int,
) -> tuple[TarMembers, np.ndarray | None]:
    """Return the images of shards and, if they have any, their labels (M,); their index is made where it is missing.

    Raises:
        InputError: if a shard is broken, or holds something else.
    """
    files: list[list[Any]] = [[str(shard), shard.stat().st_size, shard.stat().st_mtime_ns] for shard in shards]
    form = {"format": 1, "image_extension": image_extension, "label_extension": label_extension}
    key = hashlib.sha256(json.dumps([form, [path for path, _, _ in files]]).encode()).hexdigest()[:10]
    folder = data_dir / f"webdataset-{key}"

    def make(work: Path) -> None:
        counts: list[int] = []
        labels: list[np.ndarray] = []
        index = partial(index_shard, image_extension=image_extension, label_extension=label_extension)

        def index_each() -> Iterator[np.ndarray]:
            with (
                ThreadPoolExecutor(num_workers) as pool,
                open(work / "keys.txt", "w", encoding="utf-8", errors="surrogateescape", newline="\n") as keys,
            ):
                for shard, found in zip(shards, track(pool.map(index, shards), "shards", len(shards)), strict=True):
                    place = str(shard).translate(BREAKS)
                    keys.writelines(f"{place}\t{name.translate(BREAKS)}\n" for name in found.names)
                    counts.append(len(found.names))
                    labels.append(np.array(found.labels, np.int64))
                    if found.num_passed_over:
                        logger.info("%d files in %s are passed over", found.num_passed_over, shard)
                    yield found.members

        write_array(work / "members.npy", index_each(), row_shape=(2,), dtype=np.int64, total=0)
        if not sum(counts):
            raise InputError(
                f"{format_count(len(shards), 'shard')} such as {shards[0]} without any image",
                expected="files such as 000001.jpg in it",
                do="set dataset.path=DIR to a folder of shards with images",
            )
        labelled = [len(found) for found in labels]
        if any(labelled):
            check_all_labelled(shards, counts, labelled, label_extension)
            write_labels(work / "labels.npy", np.concatenate(labels))
        (work / "shards.json").write_text(json.dumps({"files": files, "counts": counts, "labelled": any(labelled)}))

    def read_parts(folder: Path) -> tuple[list[int], np.ndarray, np.ndarray | None]:
        index = read_json_object(folder / "shards.json", max_bytes=MAX_BYTES_OF_LIST)
        if index.get("files") != files or len(index["counts"]) != len(files):
            raise ValueError("it is that of other shards")
        members = map_array(folder / "members.npy")
        labels = np.load(folder / "labels.npy") if index["labelled"] else None
        expected = [(members, (sum(index["counts"]), 2))] + ([] if labels is None else [(labels, (len(members),))])
        is_complete = all(array.dtype == np.int64 and array.shape == shape for array, shape in expected)
        if not is_complete or not (folder / "keys.txt").is_file():
            raise ValueError("a part of it is missing")
        return index["counts"], members, labels

    def is_up_to_date(folder: Path) -> bool:
        try:
            read_parts(folder)
        except (OSError, EOFError, ValueError, KeyError, TypeError):  # not as `make` has written it
            return False
        return True

    written = ["keys.txt", "labels.npy", "members.npy", "shards.json"]
    make_folder_once(folder, make, ready=is_up_to_date, replaceable=written)
    counts, members, labels = read_parts(folder)
    logger.info(
        "%s in %s; %s says what is which",
        *(format_count(len(members), "image"), format_count(len(shards), "shard"), folder / "keys.txt"),
    )
    return TarMembers([path for path, _, _ in files], counts, members, folder / "keys.txt"), labels
