"""What made a run: the command line, the versions of the packages and the commit of the source tree."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from deepclust import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "hydra-core",
    "numpy",
    "scikit-learn",
)  # that numbers depend on


def read_versions() -> dict[str, str]:
    """Return the versions of Python, of deepclust and of PACKAGES."""
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


def hide_environment_values(argument: str) -> str:
    """Return an argument without the values of `hydra.job.env_set`, which may be keys and passwords."""
    key, _, value = argument.partition("=")
    return f"{key}=..." if value and key.lstrip("+~").startswith("hydra.job.env_set") else argument
