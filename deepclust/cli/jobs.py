"""Running the jobs of a verb as a Hydra application: one job, or one for each value of a sweep.

A job's last error stays in its run folder as error.txt. In a sweep one bad job does not stop the others.
"""

import contextlib
import importlib
import os
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepclust.cli.arguments import check_flags, parse_arguments, quote_path
from deepclust.cli.environment import FULL_ERROR, command_line_arguments, environment_variable
from deepclust.cli.system_errors import storage_errors_explained
from deepclust.cli.terminal import notice_on_terminal, print_message, show_warnings, warnings_in_log
from deepclust.errors import InputError
from deepclust.exit_codes import DONE, exit_code_of_error

RUN_FOLDER_VERBS = ("train", "cluster")  # which keep what they do, and their configuration, in Hydra's folder


@dataclass
class JobOutcomes:
    """What became of the jobs that ran in this process."""

    folders: list[Path] = field(default_factory=list)
    failures: list[tuple[Path, Exception]] = field(default_factory=list)
    is_sweep: bool = False


class JobFailed(Exception):
    """A job's failure on its way to the process that launched it: (summary, exit code, traceback or '')."""


def run_verb(verb: str, arguments: list[str]) -> int:
    """Run the jobs of a verb and return the exit code.

    Raises:
        InputError: if the configuration cannot be composed, or the only job fails with one.
        Exception: what the only job raises.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from deepclust.config.composition import COMPOSITION_ERRORS, CONFIG_PACKAGE, VERSION_BASE
    from deepclust.config.explain_errors import check_chosen_options, explain_composition_error

    is_sweep = bool({"-m", "--multirun"} & {*arguments})
    arguments = [quote_path(argument, is_sweep=is_sweep, verb=verb) for argument in arguments]
    flags = parse_arguments(verb, arguments)
    composed_from = {
        "config_name": flags.config_name or verb,
        "config_dir": flags.config_dir,
        "overrides": flags.overrides,
    }
    check_flags(flags, **composed_from)
    check_chosen_options(command=f"deepclust {verb}", **composed_from)
    users_full_error = os.environ.get(FULL_ERROR)
    launching_process = os.getpid()
    outcomes = JobOutcomes()

    def run_one_job(cfg: DictConfig) -> Any:
        hydra_settings = HydraConfig.get()
        folder = Path(hydra_settings.runtime.output_dir)
        outcomes.is_sweep = hydra_settings.mode == RunMode.MULTIRUN
        outcomes.folders.append(folder)
        keeps_run_folder = verb in RUN_FOLDER_VERBS or hydra_settings.output_subdir is not None
        with environment_variable(FULL_ERROR, users_full_error), warnings_in_log(held_warnings):
            try:
                return pick_objective(run_job(verb, cfg, folder if keeps_run_folder else None))
            except Exception as error:
                outcomes.failures.append((folder, error))
                if not outcomes.is_sweep:
                    return None  # raised by `end_jobs`: Hydra would print its own lines first
                hides_traceback = isinstance(error, InputError) and users_full_error != "1"
                trace = "" if hides_traceback else "".join(traceback.format_exception(error))
                overrides = " ".join(hydra_settings.overrides.task)
                text = f"job {hydra_settings.job.num} ({overrides}): {summarize_error(error)}"
                # A plain sweep in this process goes on; a distant launcher or a searching sweeper must be told.
                is_here = os.getpid() == launching_process
                if is_here and hydra_settings.sweeper._target_.endswith(".BasicSweeper"):
                    if not getattr(error, "is_printed", False):
                        sys.stderr.write(trace)
                        print_message(f"error: {text}")
                    return None
                raise JobFailed(text, exit_code_of_error(error), trace) from None

    run_one_job.__module__ = f"deepclust.commands.{verb}"  # Hydra takes the job's name from it
    configs = f"pkg://{CONFIG_PACKAGE}"
    application = hydra.main(version_base=VERSION_BASE, config_path=configs, config_name=verb)(run_one_job)
    program = "deepclust" if flags.shell_completion else f"deepclust {verb}"
    try:
        with (
            command_line_arguments([program, *arguments]),
            environment_variable(FULL_ERROR, "1"),
            warnings.catch_warnings(record=True) as held_warnings,
        ):
            application()
    except SystemExit as end:  # after --help
        if end.code:
            raise
    except JobFailed as failed:
        text, code, trace = failed.args
        if not outcomes.failures:  # the job ran in another process
            sys.stderr.write(trace)
            print_message(f"error: {text}")
            return code
    except BrokenPipeError:  # the reader of --help, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except COMPOSITION_ERRORS as error:
        explained = explain_composition_error(error, command=f"deepclust {verb}", **composed_from)
        if not outcomes.failures:
            raise explained from error
        print_message(f"error: {explained}")
    code = end_jobs(outcomes)
    show_warnings(held_warnings)  # those for which there was no log
    return code


def pick_objective(result: Any) -> Any:
    """Return what a sweeper that searches minimises: the objective in the results of a run, else the result itself."""
    objective = result.get("objective") if isinstance(result, dict) else None
    return objective["minimised"] if isinstance(objective, dict) else result


def run_job(verb: str, cfg: Any, run_folder: Path | None) -> Any:
    """Run one job: `main(cfg)` of the verb's module. An error is also written to error.txt in the run folder."""
    from omegaconf.errors import OmegaConfBaseException

    from deepclust.config.explain_errors import explain_value_error
    from deepclust.config.schema import check_plain_values
    from deepclust.config.values import resolve_to_dict
    from deepclust.engine.launch import keep_freed_memory, launched_rank, processes_exist
    from deepclust.runs.folder import RunFolderInUse
    from deepclust.runs.hydra_files import write_hydra_files

    keep_freed_memory()
    error_file = None if run_folder is None else run_folder / "error.txt"
    if error_file is not None and launched_rank() == 0:
        with storage_errors_explained(run_folder):
            error_file.unlink(missing_ok=True)
    try:
        try:
            # Values that are missing or impossible are reported before torch is imported.
            if run_folder is not None and verb in RUN_FOLDER_VERBS and launched_rank() == 0:
                with storage_errors_explained(run_folder):
                    write_hydra_files(run_folder, cfg, replace=False)
            check_plain_values(resolve_to_dict(cfg))
            with notice_on_terminal(f"deepclust {verb}: loading ..."):
                module = importlib.import_module(f"deepclust.commands.{verb}")
            with storage_errors_explained(run_folder):
                return module.main(cfg)
        except OmegaConfBaseException as error:
            raise explain_value_error(error) from error
    except Exception as error:
        if error_file is not None and not isinstance(error, RunFolderInUse):
            if not processes_exist():  # nobody else has told of it
                with contextlib.suppress(OSError):
                    error_file.unlink(missing_ok=True)
            is_input_error = isinstance(error, InputError)
            text = f"{error}\n" if is_input_error else "".join(traceback.format_exception(error))
            is_printed = not write_error_once(error_file, text)
            if isinstance(error, InputError):
                error.is_printed = is_printed
        raise


def write_error_once(error_file: Path, text: str) -> bool:
    """Write an error down, if possible. Return False if another process of the run has written the same one."""
    try:
        with error_file.open("x", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
    except FileExistsError:
        time.sleep(1)  # the other process may still be writing
        return error_file.read_text(encoding="utf-8", errors="surrogateescape") != text
    except OSError:  # a full disk, perhaps the very error that is to be written; the caller prints it
        pass
    return True


def end_jobs(outcomes: JobOutcomes) -> int:
    """Raise the error of a single job, or sum up a sweep; return the exit code."""
    if not outcomes.failures:
        return DONE
    if not outcomes.is_sweep:
        raise outcomes.failures[0][1]
    parent = os.path.relpath(os.path.commonpath([folder for folder, _ in outcomes.failures]))
    summary = InputError(
        f"{len(outcomes.failures)} of {len(outcomes.folders)} jobs failed",
        expected="none",
        do=f"read the lines above; run folders have them as error.txt, below {parent}",
    )
    print_message(f"error: {summary}")
    return min(exit_code_of_error(error) for _, error in outcomes.failures)


def summarize_error(error: Exception) -> str:
    """Return an error as one line."""
    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
