"""A job of a sweep as a process of its own: what it prints is kept, and read for the error when it fails."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hydra.core.utils import filter_overrides
from omegaconf import DictConfig

from deepclust.errors import InputError, ProcessLost
from deepclust.exit_codes import INPUT_ERROR, exit_code_of_signal, name_signal
from deepclust.runs.provenance import describe_going_on
from deepclust.runs.sweep_jobs import summarize_traceback

LOG_FOLDER = ".jobs"
MAX_LOG_BYTES = 2**16  # of the end of a log, in which the error of a job is looked for


@dataclass
class Job:
    """A job of the sweep, with its process while it runs."""

    number: int
    overrides: list[str]
    config: DictConfig
    folder: Path
    process: subprocess.Popen | None = None
    slot: dict[str, str] | None = None  # the environment variables that give it its devices
    log_start: int = 0  # bytes of its log that are of earlier starts
    started_at: float = 0.0

    @property
    def name(self) -> str:
        """The number and values of the job, as errors name it."""
        return f"job {self.number} ({' '.join(filter_overrides(self.overrides))})"


def describe_going_on_of_sweep(sweep_folder: Path) -> str:
    """Return what to type so that the sweep of this command goes on."""
    verb = sys.argv[0].split()[-1]  # it is "deepclust VERB"
    return describe_going_on(verb, sys.argv[1:], Path(os.path.abspath(sweep_folder)), is_sweep=True)


def log_path(sweep_folder: Path, job: Job) -> Path:
    """Return the file of what a job prints."""
    return sweep_folder / LOG_FOLDER / f"{job.number}.log"


def open_log(sweep_folder: Path, job: Job) -> IO[bytes]:
    """Open the file of what a job prints, after what earlier starts have printed; nothing is kept on a full disk."""
    try:
        file = log_path(sweep_folder, job).open("ab")
        file.seek(0, os.SEEK_END)
        return file
    except OSError:
        return open(os.devnull, "wb")


def describe_failure(job: Job, code: int, sweep_folder: Path) -> tuple[Exception, str]:
    """Return the error of a job that has failed, and its traceback, '' for what the user can mend."""
    text = read_log(job, sweep_folder)
    if code == INPUT_ERROR:
        lines = [line for line in text.splitlines() if line.startswith("deepclust: error: ")]
        if lines:
            what, _, rest = lines[-1].removeprefix("deepclust: error: ").partition("; expected ")
            expected, _, do = rest.partition("; ")
            return InputError(what, expected=expected, do=do), ""
    start = text.rfind("Traceback (most recent call last):")
    if code > 0 and start >= 0:
        return RuntimeError(summarize_traceback(text[start:])), text[start:]
    ending = f"killed by {name_signal(-code)}" if code < 0 else f"ended with exit code {code}"
    if code > 128 and code - 128 in set(signal.Signals):
        ending = f"stopped by {name_signal(code - 128)}"
    do = f"see {log_path(sweep_folder, job)}; to go on: {describe_going_on_of_sweep(sweep_folder)}"
    return ProcessLost(ending, do=do, exit_code=code if code > 0 else exit_code_of_signal(-code)), ""


def read_log(job: Job, sweep_folder: Path) -> str:
    """Return the end of what a job has printed since its last start."""
    try:
        with log_path(sweep_folder, job).open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(job.log_start, end - MAX_LOG_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
