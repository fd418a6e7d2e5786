"""What one tar shard holds: where each image begins, what it is called, and its label, found by reading the headers."""

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepclust.datasets.image_formats import FORMAT_OF_SUFFIX, IMAGE_FORMATS
from deepclust.errors import InputError

META_FILES = re.compile(r"__[^/]*__($|/)")  # which webdataset passes over, too
BYTES_AFTER_END = 2**20  # that are looked at after the end of an archive; tar fills its last 10 kB with zeros
BYTES_OF_LABEL = 100  # that are read of one
# In a shard, the format of an image is known by its first bytes.
IMAGE_EXTENSIONS = frozenset(suffix[1:] for suffix, name in FORMAT_OF_SUFFIX.items() if name in IMAGE_FORMATS)


class ShardFile(NamedTuple):
    """A file in a shard."""

    name: str
    start: int  # where its content begins
    size: int  # bytes
    text: str | None  # its content, if it is a label


@dataclass(frozen=True)
class IndexedShard:
    """What the index says of one shard."""

    members: np.ndarray  # int64 (m, 2): where each image begins, and how many bytes it has
    names: list[str]  # m names of images
    labels: list[int]  # m, or none
    num_passed_over: int  # files that belong to no image: without an extension, links, hidden ones


def index_shard(shard: Path, *, image_extension: str | None, label_extension: str | None) -> IndexedShard:
    """Find the images of one shard, and read their labels.

    Raises:
        InputError: if it is broken; if the files of a key lie apart, or one is there twice; if a key has no image, or
            several; or if a label is no integer, or some images have none.
    """
    members: list[tuple[int, int]] = []
    names: list[str] = []
    labels: list[int] = []
    unlabelled: list[str] = []
    num_passed_over = 0

    def add(key: str, files: dict[str, ShardFile]) -> None:
        image = choose_image(shard, key, files, image_extension)
        members.append((image.start, image.size))
        names.append(image.name)
        if label_extension in files:
            labels.append(read_label(shard, files[label_extension]))
        else:
            unlabelled.append(key)

    seen: set[str] = set()
    current: str = ""
    files: dict[str, ShardFile] = {}
    for key, extension, file in list_files(shard, label_extension):
        if not extension:
            num_passed_over += 1
            continue
        if key != current:
            if files:
                add(current, files)
            if key in seen:
                raise InputError(
                    f"the files of {key} in {shard} do not follow one another",
                    expected="shards in which they do, as webdataset writes them",
                    do="write this shard again, in the order of the names: tar --sort=name",
                )
            seen.add(key)
            current, files = key, {}
        if extension in files:
            raise InputError(f"{shard} holds {file.name} twice", expected="each file once", do="write this shard again")
        files[extension] = file
    if files:
        add(current, files)
    if labels and unlabelled:
        raise unlabelled_error(f"{len(unlabelled)} of {len(names)} images in {shard}", unlabelled[0], label_extension)
    return IndexedShard(np.array(members, np.int64).reshape(-1, 2), names, labels, num_passed_over)


def list_files(shard: Path, label_extension: str | None) -> Iterator[tuple[str, str, ShardFile]]:
    """Yield key and extension of each file in a shard, and the file.

    What webdataset passes over has no extension: what is no regular file, or hidden, or named without one.

    Raises:
        InputError: if the shard is broken, or compressed.
    """
    from webdataset.tariterators import base_plus_ext

    try:
        with tarfile.open(shard, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else all would be kept
                key, extension = base_plus_ext(member.name)
                if key is None or not member.isreg() or META_FILES.match(member.name):
                    key = extension = ""
                extension, text = extension.lower(), None
                if extension and extension == label_extension and (opened := archive.extractfile(member)) is not None:
                    text = opened.read(BYTES_OF_LABEL).decode(errors="replace")
                yield key, extension, ShardFile(member.name, member.offset_data, member.size, text)
            check_end(archive)
    except Exception as error:  # a broken archive can raise nearly any exception
        raise InputError(
            f"{shard} is broken or no tar file: {' '.join(str(error).split()) or type(error).__name__}",
            expected="a tar file that is complete and not compressed",
            do="copy or write this shard again; one that is compressed has to be unpacked first",
        ) from error


def check_end(archive: tarfile.TarFile) -> None:
    """Refuse an archive that does not end where its last file ends: tarfile takes any broken header for the end.

    Raises:
        ValueError: with a reason.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    rest = archive.fileobj.read(BYTES_AFTER_END)
    if not rest:
        raise ValueError("it has no end mark, so that it may have been cut short")
    if rest.strip(b"\0"):
        raise ValueError(f"there is no file and no end at byte {archive.offset:,}")


def choose_image(shard: Path, key: str, files: dict[str, ShardFile], image_extension: str | None) -> ShardFile:
    """Return the image among the files of a key, by extension.

    Raises:
        InputError: if there is none, or there are several and `image_extension` does not say which.
    """
    found = [
        extension
        for extension in files
        if (
            extension.rpartition(".")[2] in IMAGE_EXTENSIONS
            if image_extension is None
            else extension == image_extension
        )
    ]
    if len(found) == 1:
        return files[found[0]]
    others = f" (but {', '.join(sorted(files))})"
    if found:
        raise InputError(
            f"{key} in {shard} has several images: {', '.join(sorted(found))}",
            expected="one image for each key",
            do=f"set dataset.image_extension={found[0]}, or another of them",
        )
    raise InputError(
        f"{key} in {shard} has no image{others}",
        expected="a file such as KEY.jpg for each key" if image_extension is None else f"a file KEY.{image_extension}",
        do="write this shard again without this key"
        + ("" if image_extension is None else ", or set dataset.image_extension=null for images of any format"),
    )


def read_label(shard: Path, file: ShardFile) -> int:
    """Return the label that a file holds as text.

    Raises:
        InputError: if it is no integer.
    """
    if file.text is not None and re.fullmatch(r"\s*-?\d{1,18}\s*", file.text):
        return int(file.text)
    raise InputError(
        f"{file.name} in {shard} holds {str(file.text)[:20]!r}",
        expected="the number of a class, as text",
        do="write numbers, or leave the labels out with dataset.label_extension=null",
    )


def check_all_labelled(
    shards: Sequence[Path], counts: Sequence[int], labelled: Sequence[int], label_extension: str | None
) -> None:
    """Refuse shards without labels beside some with labels.

    Raises:
        InputError: naming one.
    """
    for shard, count, num_labelled in zip(shards, counts, labelled, strict=True):
        if num_labelled < count:
            raise unlabelled_error(f"the images in {shard}", None, label_extension)


def unlabelled_error(which: str, key: str | None, label_extension: str | None) -> InputError:
    """Return the error for some images without a label where others have one."""
    return InputError(
        f"{which} have no label{'' if key is None else f', such as {key}'}, and others have",
        expected=f"a file KEY.{label_extension} for each image, or for none",
        do="write -1 for an unknown class, or leave the labels out with dataset.label_extension=null",
    )
