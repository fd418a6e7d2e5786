"""What made a run: the command line, how it goes on, the versions of the packages and the commit of the source tree."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from deepclust import __version__
from deepclust.config.override_format import format_override

PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "hydra-core",
    "numpy",
    "scikit-learn",
)  # that numbers depend on
HIDDEN = "..."  # in place of values that may be keys and passwords
# Holds what `describe_going_on` says, for the processes of the run, which know neither Hydra nor the calling program.
GOING_ON = "DEEPCLUST_GOING_ON"


def read_versions() -> dict[str, str]:
    """Return the versions of Python, of deepclust and of PACKAGES."""
    from importlib.metadata import version  # slow to import, and the command line imports this module at each start

    # deepclust's own is not asked of the installation: the source tree may run without one.
    own = {"python": platform.python_version(), "deepclust": __version__}
    return own | {name: version(name) for name in PACKAGES}


def read_commit() -> str | None:
    """Return the commit of the source tree that runs, with `-dirty` if files differ; None outside a checkout."""
    folder = str(Path(__file__).resolve().parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def read_command_line() -> str:
    """Return the command as it was typed, but for the values of environment variables that it sets."""
    arguments = [hide_environment_values(argument) for argument in sys.argv[1:]]
    return shlex.join([*Path(sys.argv[0]).name.split(), *arguments])  # argv[0] is "deepclust VERB"


def describe_going_on(
    verb: str, arguments: list[str], folder: Path, *, is_sweep: bool = False, is_from_python: bool = False
) -> str:
    """Return what to type, or to call, so that a run goes on that was stopped.

    The command names the folder: without it, the same command would begin a new run in a folder of the day and time.

    Args:
        verb: of the command line, or the name of the function.
        arguments: of the command line, as they were typed.
        folder: of the run; of a sweep, that of all its runs.
        is_sweep: whether there are several runs.
        is_from_python: whether a Python program called.
    """
    place = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    if is_from_python:
        return f"call deepclust.{verb} again with the same arguments and run_dir={place!r}"
    key = "hydra.sweep.dir" if is_sweep else "hydra.run.dir"
    given = [hide_environment_values(word) for word in arguments if not word.lstrip("+").startswith(f"{key}=")]
    return f"{shlex.join(['deepclust', verb, *given])} {format_override(key, place)}"


def read_going_on() -> str | None:
    """Return what the command that runs now has said of how to go on; None outside of commands."""
    return os.environ.get(GOING_ON)


def hide_environment_values(argument: str) -> str:
    """Return an argument without the values of `hydra.job.env_set`, which may be keys and passwords."""
    key, _, value = argument.partition("=")
    is_of_environment = key.lstrip("+~").startswith("hydra") and "env_set" in argument
    return f"{key}={HIDDEN}" if value and is_of_environment else argument
