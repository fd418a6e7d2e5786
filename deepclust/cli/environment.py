"""What a command changes in its process for a while: environment variables and the command line."""

import contextlib
import os
import sys
from collections.abc import Iterator

FULL_ERROR = "HYDRA_FULL_ERROR"  # 1: Hydra raises instead of printing, and the user is shown tracebacks
JOBS_TO_START = "DEEPCLUST_JOBS_TO_START"  # numbers of the jobs of a sweep that run, as in 0,3; unset: all


def is_job_started(number: int) -> bool:
    """Return whether the job of this number in a sweep is to be started: `deepclust sweep` leaves some as they are."""
    numbers = os.environ.get(JOBS_TO_START)
    return numbers is None or str(number) in numbers.split(",")


@contextlib.contextmanager
def environment_variable(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable, or unset it (None), inside the `with` block."""
    previous = os.environ.get(name)
    set_environment_variable(name, value)
    try:
        yield
    finally:
        set_environment_variable(name, previous)


def set_environment_variable(name: str, value: str | None) -> None:
    """Set an environment variable, or unset it (None)."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextlib.contextmanager
def command_line_arguments(argv: list[str]) -> Iterator[None]:
    """Make `argv` the command line of the process inside the `with` block."""
    previous, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = previous
