"""Arrays in .npy and .npz files: opened without trusting what the files say of themselves."""

import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.engine.memory_estimate import read_available_bytes
from deepclust.errors import InputError

ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")
IS_ENCRYPTED = 0x1  # bit of the flags of a member of a zip file
# A small file that unpacks into a large array of the same few numbers holds no images.
MAX_UNPACKED_BYTES, MAX_UNPACKING_FACTOR = 2**30, 200


def map_array(file: Path) -> np.ndarray:
    """Return the array of a .npy file, memory-mapped.

    Raises:
        ValueError, OSError, EOFError: with a reason in one line, if the file holds something else or is cut short.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError):
        raise
    except Exception as error:  # whatever reading a made-up header raises
        text = str(error) or type(error).__name__
        reason = "it is shorter than its header says" if "mmap length" in text else text.splitlines()[0]
        raise ValueError(reason) from error
    if not isinstance(array, np.ndarray):
        raise ValueError("it holds several arrays")
    return array


def check_not_cut_short(array: np.ndarray) -> None:
    """Refuse to read a memory-mapped file that has become shorter since it was opened.

    The system would end the process without a word. The check is cheap enough for each batch.

    Raises:
        InputError: naming the file.
    """
    mapping: Any = getattr(array, "_mmap", None)
    if mapping is not None and mapping.size() < len(mapping):
        raise InputError(
            f"{getattr(array, 'filename', None) or 'a memory-mapped file'} was cut short while it was read "
            f"({mapping.size()} of {len(mapping)} bytes are left)",
            expected="a file that stays as it was opened",
            do="bring it back and start the same command again: training goes on from the last checkpoint",
        )


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays `images` and, if there are any, `labels` of a .npz file; other members are not read.

    A single array of any name besides `labels` passes for `images`.

    Raises:
        InputError: if there is no such array, or it is encrypted, or not what it says it is, or too large.
        Exception: whatever reading a broken file raises.
    """
    with zipfile.ZipFile(file) as archive:
        members = list_arrays(archive)
        labels = members.pop("labels", None)
        if "images" not in members and len(members) != 1:
            raise InputError(
                f"{file} holds {', '.join(members) or 'no array of images'}",
                expected="an array named images",
                do="write it with numpy.savez(FILE, images=images, labels=labels)",
            )
        images = members["images"] if "images" in members else next(iter(members.values()))
        return read_members(file, archive, {"images": images} | ({} if labels is None else {"labels": labels}))


def read_named_arrays(file: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Return those arrays of a .npz file that have one of the names; other members are not read.

    Raises:
        InputError: if one is encrypted, or not what it says it is, or too large.
        Exception: whatever reading a broken file raises.
    """
    with zipfile.ZipFile(file) as archive:
        members = list_arrays(archive)
        return read_members(file, archive, {name: info for name, info in members.items() if name in names})


def list_arrays(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the members of a .npz file that are arrays, by name."""
    return {
        info.filename.removesuffix(".npy"): info
        for info in archive.infolist()
        if info.filename.endswith(".npy") and not info.is_dir()
    }


def read_members(file: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> dict[str, np.ndarray]:
    """Return arrays of a .npz file by name, after all of them have been checked."""
    for info in members.values():
        check_member(file, archive, info)
    arrays = {}
    for name, info in members.items():
        with archive.open(info) as member:
            arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    return arrays


def check_member(file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Refuse an array of a .npz file that cannot be read, before any memory is taken for it.

    Raises:
        InputError: if it is encrypted, shorter than its header says, or too large.
    """
    if info.flag_bits & IS_ENCRYPTED:
        raise InputError(
            f"{info.filename} in {file} is encrypted",
            expected="arrays as numpy.savez writes them",
            do="write it again without a password",
        )
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version in read_header:
            shape, _, dtype = read_header[version](member)
            num_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
            if not dtype.hasobject and num_bytes != info.file_size - member.tell():
                raise InputError(
                    f"{info.filename} in {file} says that it holds {num_bytes:,} bytes, and holds "
                    f"{info.file_size - member.tell():,}",
                    expected="arrays as numpy.savez writes them",
                    do="write it again",
                )
    is_bomb = info.file_size > MAX_UNPACKED_BYTES and info.file_size > MAX_UNPACKING_FACTOR * info.compress_size
    if is_bomb or info.file_size > measure_memory():
        raise InputError(
            f"{info.filename} in {file} unpacks from {info.compress_size / 1e6:,.1f} MB to "
            f"{info.file_size / 1e9:,.1f} GB",
            expected="images that fit into memory",
            do="write them with numpy.save(FILE.npy, images), which is read memory-mapped",
        )


def measure_memory() -> int:
    """Return the bytes of memory that can still be taken; where the system does not say, all that there are."""
    available = read_available_bytes()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if available is None else available
