"""Output files that are complete or not there: checked before the work, written beside their place and moved into it.

What is no regular file, such as a pipe, a device or /dev/stdout, is written through instead of being replaced.
"""

import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from deepclust.errors import InputError

if TYPE_CHECKING:  # the command line shows its help without waiting for it
    import numpy as np

SUFFIX_WHILE_WRITTEN = ".writing"
MAX_NAME_BYTES = 255  # of one name on nearly every file system
MAX_SUFFIX_BYTES = 32


def check_output_file(path: Path, *, key: str) -> None:
    """Refuse an output file that cannot be written, before the work for it is done. `key` is the key that names it.

    Raises:
        InputError: if a folder is in its place, the name is too long, or the folder above it is none or read-only.
    """
    if os.path.isdir(path):
        raise InputError(
            f"{path} is a folder",
            expected="the name of a file to write",
            do=f"set {key}=FILE, for example a new file in that folder",
        )
    reason = None
    if max(len(os.fsencode(name)) for name in path.absolute().parts) > MAX_NAME_BYTES:
        reason = os.strerror(errno.ENAMETOOLONG)
    elif not is_written_through(path):
        above = path.absolute().parent
        while not os.path.lexists(above):
            above = above.parent
        if not above.is_dir():
            reason = f"{above} is no folder"
        elif not os.access(above, os.W_OK | os.X_OK):
            reason = f"{above} is read-only"
    if reason is not None:
        raise InputError(
            f"{path} cannot be written: {reason}",
            expected="the name of a file in a folder that can be written",
            do=f"set another {key}=FILE",
        )


def is_written_through(path: Path) -> bool:
    """Return whether an output is no regular file: a pipe, a device, or a name of an open file such as /dev/stdout."""
    is_special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    return is_special or find_open_descriptor(path) is not None


def is_standard_output(path: Path) -> bool:
    """Return whether what is written into a file comes out of the standard output of this process."""
    try:
        return find_open_descriptor(path) == 1 or os.path.samestat(path.stat(), os.fstat(1))
    except OSError:  # there is no such file, or no standard output
        return False


def find_open_descriptor(path: Path) -> int | None:
    """Return N if the path leads to the open file N of this process, as /dev/stdout and /dev/fd/N do; else None."""
    for _ in range(40):  # the system follows no longer chain of links
        above = os.path.realpath(path.absolute().parent)
        if path.name.isdigit() and above in (f"/proc/{os.getpid()}/fd", "/dev/fd"):
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)
    return None


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give the name of a new file to write; when the block ends without an error, it takes the place of `path`.

    Where `path` is no regular file, the content is copied into it. A link is followed. After an error nothing is left.

    Raises:
        InputError: if `path` is a folder, or the folder that it is in has gone.
        OSError: naming the file, what else the system refuses.
    """
    if path.is_dir():
        raise InputError(
            f"{path} is a folder", expected="a file or nothing in this place", do="remove or rename this folder"
        )
    with name_file_in_errors(path):
        if is_written_through(path):
            with tempfile.TemporaryDirectory() as folder:
                content = Path(folder) / "content"
                yield content
                write_through(content, path)
            return
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        check_folder_is_there(target.parent)
        temporary = name_while_written(target)
        try:
            temporary.unlink(missing_ok=True)  # of a process that was killed
            yield temporary
            os.replace(temporary, target)
        except BaseException:
            if temporary.is_file() or temporary.is_symlink():
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Let an error of the system that names no file, such as that of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def check_folder_is_there(folder: Path) -> None:
    """Refuse to write into a folder that was there at the start and has gone.

    Raises:
        InputError: saying how to go on.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} was removed or renamed while this command ran",
            expected="the folder to stay where it was until the end",
            do="rename it back, if you renamed it, and start the same command again",
        )


def name_while_written(path: Path) -> Path:
    """Return the name, beside `path`, of the file that is going to take its place."""
    if len(os.fsencode(path.name + SUFFIX_WHILE_WRITTEN)) <= MAX_NAME_BYTES:
        return path.with_name(path.name + SUFFIX_WHILE_WRITTEN)
    return path.with_name(hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16] + SUFFIX_WHILE_WRITTEN)


def write_through(content: Path, path: Path) -> None:
    """Copy a file into a pipe, a device or an open file."""
    number = find_open_descriptor(path)
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None:
            stream.flush()  # what was printed before comes first
    descriptor = os.open(path, os.O_WRONLY) if number is None else os.dup(number)
    with open(content, "rb") as source, open(descriptor, "wb") as target:
        shutil.copyfileobj(source, target)


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all. Bytes of file names that are no valid text stay as they are."""
    write_bytes(path, text.encode("utf-8", errors="surrogateescape"))


def write_bytes(path: Path, content: Any) -> None:
    """Write a file of bytes, complete or not at all."""
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


def write_text_once(path: Path, text: str) -> bool:
    """Write a text file unless there is one already, and return whether it was written; after an error nothing is left.

    Of several processes that do so at once, one writes it.
    """
    with name_file_in_errors(path):
        try:
            file = path.open("x", encoding="utf-8", errors="surrogateescape")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(text)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return True


@contextmanager
def replace_text_file(path: Path) -> Iterator[IO[str]]:
    """Open a text file to be written piece by piece, as `replace_file` does. Line ends are written as they are."""
    with (
        replace_file(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        yield file
        file.close()  # what is written last may be what does not fit on the disk


def write_array(
    path: Path, chunks: "Iterable[np.ndarray]", *, row_shape: tuple[int, ...], dtype: Any, total: int
) -> int:
    """Write chunks (n, *row_shape), one after the other, as one .npy array (M, *row_shape); return M.

    The space of `total` rows is taken first, so that a full disk is known before the work of making them. Nothing is
    mapped into memory: writing to a mapped file on a full disk kills the process.
    """
    import numpy as np

    dtype, count = np.dtype(dtype), 0
    with replace_file(path) as temporary, open(temporary, "wb") as out:
        write_array_header(out, (0, *row_shape), dtype)
        reserve_space(out, out.tell() + total * int(np.prod(row_shape, dtype=np.int64)) * dtype.itemsize)
        for chunk in chunks:
            out.write(np.ascontiguousarray(chunk, dtype).data.cast("B") if chunk.size else b"")
            count += len(chunk)
        out.truncate()
        out.seek(0)
        write_array_header(out, (count, *row_shape), dtype)
        out.close()
    return count


def write_array_header(out: Any, shape: tuple[int, ...], dtype: "np.dtype") -> None:
    # NumPy pads the header so that any length of the first dimension fits. It can thus be overwritten at the end.
    from numpy.lib import format as npy_format

    header = {"descr": npy_format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy_format.write_array_header_1_0(out, header)


def reserve_space(file: IO[bytes], size: int) -> None:
    """Let an open file have `size` bytes on the disk, where the system can do that.

    Raises:
        OSError: if there is not so much space.
    """
    file.flush()
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # not on every system
        pass
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.ESPIPE):
            raise


def shorten_name(name: str) -> str:
    """Return a file name that is not too long for a file system: the end before its suffix is left out."""
    encoded = os.fsencode(name)
    if len(encoded) <= MAX_NAME_BYTES:
        return name
    suffix = os.fsencode(os.path.splitext(name)[1])
    if len(suffix) > MAX_SUFFIX_BYTES:  # what follows the last dot is no suffix then
        suffix = b""
    stem = encoded[: MAX_NAME_BYTES - len(suffix)]
    while ends_within_character(stem):
        stem = stem[:-1]
    return os.fsdecode(stem + suffix)


def ends_within_character(encoded: bytes) -> bool:
    """Return whether UTF-8 text ends in the middle of a character. Bytes that are no such text are left alone."""
    try:
        encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False
