"""Errors of the operating system, such as that of a full disk, as one line that says what to do."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from deepclust.errors import InputError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_PERMISSION = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def storage_errors_explained(run_folder: Path | None) -> Iterator[None]:
    """Turn what the system says of files and disks into errors that say what to do.

    Raises:
        InputError: in place of an OSError that names a file, or that only a disk can cause.
    """
    try:
        yield
    except OSError as error:
        raise explain_storage_error(error, run_folder) from error


def explain_storage_error(error: OSError, run_folder: Path | None) -> Exception:
    """Return the InputError for an error of a file or a disk; other errors, such as those of a network, as they are."""
    is_of_storage = error.errno in NO_SPACE | NO_PERMISSION | {errno.EIO, errno.EINTR}
    if isinstance(error, InputError) or error.errno is None or not (error.filename or is_of_storage):
        return error
    again = "start the same command again"
    if run_folder is not None:
        from deepclust.engine.output_files import check_folder_is_there

        try:
            check_folder_is_there(run_folder)
        except InputError as gone:
            return gone
        again += " in the same folder: training goes on from the last checkpoint"
    place = name_place(error) or run_folder or Path.cwd()
    if error.errno in NO_SPACE:
        expected, cure = "room for what is written", "free space"
    elif error.errno in NO_PERMISSION:
        expected, cure = "permission to read and write there", "give it, or name another place,"
    elif error.errno == errno.ENAMETOOLONG:
        expected, cure = "a name that the file system takes", "choose a shorter one"
    elif error.errno == errno.EINTR:  # Python repeats most calls, but not all of those that file servers interrupt
        expected, cure = "a file system that answers", "wait until it does"
    elif error.errno == errno.EPIPE:
        expected, cure = "a reader that reads to the end", "let it read everything"
    else:
        expected, cure = "a file or folder that can be read and written there", "correct that, or name another place,"
    return InputError(f"{error.strerror}: {place}", expected=expected, do=f"{cure} and {again}")


def name_place(error: OSError) -> str:
    """Return the file of an error, or both of a copy, of which the system does not tell which it was; "" for none."""
    names = [error.filename, error.filename2]
    if error.errno in NO_SPACE and error.filename2:
        names = [error.filename2]  # a full disk is that of the file being written
    return " -> ".join(os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in names if name)
