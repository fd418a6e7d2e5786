"""What the command line writes on standard error: one-line messages, a notice while loading, and held warnings."""

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Iterator


def print_message(text: str) -> None:
    """Print one line on standard error that begins with the program's name."""
    print(f"deepclust: {' '.join(text.split())}", file=sys.stderr)


@contextlib.contextmanager
def notice_on_terminal(text: str) -> Iterator[None]:
    """Show a notice on a terminal inside the `with` block. Whatever is written meanwhile overwrites it."""
    if not sys.stderr.isatty():
        yield
        return
    print(text, end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(" " * len(text), end="\r", file=sys.stderr, flush=True)


@contextlib.contextmanager
def warnings_in_log(held: list[warnings.WarningMessage]) -> Iterator[None]:
    """Send warnings to the job's log, if it has one, beginning with the `held` ones: standard error is for errors."""
    if not logging.root.handlers:
        yield
        return
    logging.captureWarnings(True)
    try:
        show_warnings(held)
        held.clear()
        yield
    finally:
        logging.captureWarnings(False)


def show_warnings(held: list[warnings.WarningMessage]) -> None:
    """Show warnings that were recorded earlier."""
    for warning in held:
        warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


def pass_over_storage_errors_of_log() -> None:
    """Let a log file that cannot be written, as on a full disk, lack lines, in place of a traceback for each of them.

    Nothing else depends on it, and what the run itself cannot write then tells of the disk.
    """
    for handler in logging.root.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = functools.partial(handle_log_error, handler)  # type: ignore[method-assign]


def handle_log_error(handler: logging.Handler, record: logging.LogRecord) -> None:
    """Show the error that is being handled, as `logging` does, unless it is one of a file."""
    if not isinstance(sys.exception(), OSError):
        logging.Handler.handleError(handler, record)
