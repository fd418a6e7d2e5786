"""What became of the jobs of a verb, and how it is told: the table of a sweep, the exit code, the error in one line."""

import contextlib
import os
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepclust.cli.terminal import print_message
from deepclust.errors import InputError
from deepclust.exit_codes import DONE, exit_code_of_error


@dataclass
class JobOutcomes:
    """What became of the jobs that ran in this process.

    `failed_elsewhere` is the exit code of a job that failed in another process, None without one.
    """

    folders: list[Path] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)  # the composed configuration of each job
    results: list[Any] = field(default_factory=list)  # what `main` of the verb returned, for each job that succeeded
    failures: list[tuple[Path, Exception]] = field(default_factory=list)
    begun: list[Path] = field(default_factory=list)  # folders of the jobs whose values, paths and numbers were accepted
    is_sweep: bool = False
    sweep_folder: Path | None = None  # of a sweep, with the folders of its jobs
    failed_elsewhere: int | None = None


class JobFailed(Exception):
    """A job's failure on its way to the process that launched it: (summary, exit code, traceback or '')."""


def pick_objective(result: Any) -> Any:
    """Return what a sweeper that searches minimises: the objective in the results of a run, else the result itself."""
    objective = result.get("objective") if isinstance(result, dict) else None
    return objective["minimised"] if isinstance(objective, dict) else result


def remove_new_folders(outcomes: JobOutcomes) -> None:
    """Remove what jobs that were refused before they began have left in folders that nobody has named.

    That is the log, the configuration and the error, which is printed. A folder with anything else in it stays, and so
    does that of a job of several processes.
    """
    from deepclust.engine.launch import processes_exist

    if processes_exist():
        return
    folders = [*outcomes.folders, *([outcomes.sweep_folder] if outcomes.sweep_folder else [])]
    if any(Path.cwd().is_relative_to(folder.absolute()) for folder in folders):
        return
    own = {"error.txt", "multirun.yaml", "config.yaml", "hydra.yaml", "overrides.yaml"}
    for folder in folders:
        entries = [entry for entry in folder.rglob("*") if entry != folder / ".hydra"]
        if not all(entry.is_file() and (entry.name in own or entry.suffix == ".log") for entry in entries):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        above = folder.parent  # of the day, and `outputs`
        while above != Path.cwd() and above.is_relative_to(Path.cwd()):
            try:
                above.rmdir()
            except OSError:  # it holds other runs
                break
            above = above.parent


def show_table(outcomes: JobOutcomes) -> None:
    """End a sweep with the table over its finished runs, and the command that shows it again."""
    from deepclust.commands.compare import print_table

    folder = outcomes.sweep_folder
    if folder is None or not folder.is_dir():
        return
    place = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    with contextlib.suppress(InputError):  # no run to show: the errors are told
        print_table(folder)
    print(f"the same table: {shlex.join(['deepclust', 'compare', f'runs={place}'])}")


def end_jobs(outcomes: JobOutcomes) -> int:
    """Raise the error of a single job, or sum up a sweep; return the exit code."""
    if outcomes.failed_elsewhere is not None:
        return outcomes.failed_elsewhere
    if not outcomes.failures:
        return DONE
    if not outcomes.is_sweep:
        raise outcomes.failures[0][1]
    parent = os.path.relpath(os.path.commonpath([folder for folder, _ in outcomes.failures]))
    files = f"; run folders have them as error.txt, below {parent}" if os.path.exists(parent) else ""
    summary = InputError(
        f"{len(outcomes.failures)} of {len(outcomes.folders)} jobs failed",
        expected="none",
        do=f"read the lines above{files}",
    )
    print_message(f"error: {summary}")
    return min(exit_code_of_error(error) for _, error in outcomes.failures)


def summarize_error(error: Exception) -> str:
    """Return an error as one line."""
    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
