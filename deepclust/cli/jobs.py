"""Running the jobs of a verb as a Hydra application: one job, or one for each value of a sweep.

A job's last error stays in its run folder as error.txt. In a sweep one bad job does not stop the others.
"""

import contextlib
import gc
import importlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepclust.cli.arguments import check_flags, check_sweeper, name_plain_arguments, parse_arguments, quote_path
from deepclust.cli.environment import FULL_ERROR, command_line_arguments, environment_variable, is_job_started
from deepclust.cli.job_outcomes import (
    JobFailed,
    JobOutcomes,
    end_jobs,
    pick_objective,
    remove_new_folders,
    show_table,
    summarize_error,
)
from deepclust.cli.system_errors import storage_errors_explained
from deepclust.cli.terminal import (
    notice_on_terminal,
    pass_over_storage_errors_of_log,
    print_message,
    show_warnings,
    warnings_in_log,
)
from deepclust.errors import InputError, ProcessLost
from deepclust.exit_codes import exit_code_of_error

RUN_FOLDER_VERBS = ("train", "cluster")  # which keep what they do, and their configuration, in Hydra's folder


def run_verb(verb: str, arguments: list[str]) -> int:
    """Run the jobs of a verb and return the exit code.

    Raises:
        InputError: if the configuration cannot be composed, or the only job fails with one.
        Exception: what the only job raises.
    """
    outcomes = run_jobs(verb, arguments)
    if outcomes.is_sweep and len(outcomes.results) > 1 and verb in RUN_FOLDER_VERBS:
        show_table(outcomes)
    return end_jobs(outcomes)


def run_jobs(verb: str, arguments: list[str], *, is_from_python: bool = False) -> JobOutcomes:
    """Run the jobs of a verb, for the command line and for Python alike, and return what became of them.

    A message that tells how a stopped run goes on names a command, or with `is_from_python` a call.

    Raises:
        InputError: if the configuration cannot be composed.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from deepclust.config.composition import COMPOSITION_ERRORS, CONFIG_PACKAGE, VERSION_BASE

    outcomes = JobOutcomes()
    is_sweep, typed = bool({"-m", "--multirun"} & {*arguments}), arguments
    if verb == "sweep":
        arguments = name_plain_arguments(arguments)
    arguments = [quote_path(argument, is_sweep=is_sweep, verb=verb) for argument in arguments]
    flags = parse_arguments(verb, arguments)
    composed_from = {
        "config_name": flags.config_name or verb,
        "config_dir": flags.config_dir,
        "overrides": flags.overrides,
    }
    if is_sweep or any("hydra" in override for override in flags.overrides):
        prepare_plugins(outcomes)
    check_flags(flags, **composed_from)
    check_sweeper(flags.overrides)
    if flags.help and flags.config_name is None and (text := compose_own_help(verb, flags)) is not None:
        with contextlib.suppress(BrokenPipeError):  # the reader, such as head, has seen enough
            print(text, flush=True)
            return JobOutcomes()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return JobOutcomes()
    if flags.overrides:
        from deepclust.config.explain_errors import check_chosen_options

        check_chosen_options(command=f"deepclust {verb}", **composed_from)
    users_full_error = os.environ.get(FULL_ERROR)
    launching_process = os.getpid()
    keys = [override.lstrip("+").partition("=")[0] for override in flags.overrides]
    has_named_folder = bool({"hydra.run.dir", "hydra.sweep.dir"} & {*keys})

    def run_one_job(cfg: DictConfig) -> Any:
        from deepclust.engine.launch import processes_exist
        from deepclust.runs.provenance import GOING_ON, describe_going_on
        from deepclust.runs.run_folder import CHECKPOINT

        pass_over_storage_errors_of_log()
        hydra_settings = HydraConfig.get()
        folder = Path(hydra_settings.runtime.output_dir)
        outcomes.is_sweep = hydra_settings.mode == RunMode.MULTIRUN
        if outcomes.is_sweep and not is_job_started(hydra_settings.job.num):
            return None
        outcomes.folders.append(folder)
        outcomes.configs.append(cfg)
        keeps_run_folder = verb in RUN_FOLDER_VERBS or hydra_settings.output_subdir is not None
        all_runs = Path(os.path.abspath(hydra_settings.sweep.dir)) if outcomes.is_sweep else folder
        outcomes.sweep_folder = all_runs if outcomes.is_sweep else None
        going_on = describe_going_on(verb, typed, all_runs, is_sweep=outcomes.is_sweep, is_from_python=is_from_python)
        is_here = os.getpid() == launching_process
        # Elsewhere the command line is that of submitit; the job's own repeats the run.
        command = sys.argv if is_here else [program, *configs_of_user, *hydra_settings.overrides.task]
        with (
            command_line_arguments(command),
            environment_variable(FULL_ERROR, users_full_error),
            environment_variable(GOING_ON, going_on),
            warnings_in_log(held_warnings),
        ):
            try:
                run_folder = folder if keeps_run_folder else None
                result = run_job(
                    verb,
                    cfg,
                    run_folder,
                    on_begin=lambda: outcomes.begun.append(folder),
                    starts_garbage_collection=not is_from_python,
                )
                outcomes.results.append(result)
                return pick_objective(result)
            except KeyboardInterrupt:
                if verb in RUN_FOLDER_VERBS and any(folder.rglob(Path(CHECKPOINT).name)):
                    raise KeyboardInterrupt(going_on) from None
                raise
            except Exception as error:
                outcomes.failures.append((folder, error))
                if not outcomes.is_sweep:
                    return None  # raised by `end_jobs`: Hydra would print its own lines first
                hides_traceback = isinstance(error, InputError) and users_full_error != "1"
                trace = "" if hides_traceback else "".join(traceback.format_exception(error))
                overrides = " ".join(hydra_settings.overrides.task)
                text = f"job {hydra_settings.job.num} ({overrides}): {summarize_error(error)}"
                if is_here and not getattr(error, "is_printed", False):
                    sys.stderr.write(trace)
                    print_message(f"error: {text}")
                # In this process, a sweep ends that has lost a process of srun or torchrun: the next job would wait for
                # it. Hydra's launcher takes a SystemExit alone for an end. Any other plain sweep goes on. A distant
                # launcher or a searching sweeper must be told.
                if is_here and isinstance(error, ProcessLost) and processes_exist():
                    sys.exit(error.exit_code)
                if is_here and hydra_settings.sweeper._target_.endswith(".BasicSweeper"):
                    return None
                raise JobFailed(text, exit_code_of_error(error), trace) from None

    run_one_job.__module__ = f"deepclust.commands.{verb}"  # Hydra takes the job's name from it
    configs = f"pkg://{CONFIG_PACKAGE}"
    application = hydra.main(version_base=VERSION_BASE, config_path=configs, config_name=verb)(run_one_job)
    program = "deepclust" if flags.shell_completion else f"deepclust {verb}"
    chosen = {"--config-name": flags.config_name, "--config-dir": flags.config_dir}
    configs_of_user = [f"{flag}={value}" for flag, value in chosen.items() if value is not None]
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
            outcomes.failed_elsewhere = code
    except BrokenPipeError:  # the reader of --help, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError:  # of the launcher
        raise
    except COMPOSITION_ERRORS as error:
        from deepclust.cli.lost_jobs import explain_launcher_error
        from deepclust.config.explain_errors import explain_composition_error

        explained = explain_launcher_error(error) or explain_composition_error(
            error, command=f"deepclust {verb}", **composed_from
        )
        if not outcomes.failures:
            raise explained from error
        print_message(f"error: {explained}")
    except Exception as error:
        from deepclust.cli.lost_jobs import explain_lost_job

        lost = explain_lost_job(error)
        if lost is None:
            raise
        raise lost from error
    if verb in RUN_FOLDER_VERBS and outcomes.failures and not outcomes.begun and not has_named_folder:
        remove_new_folders(outcomes)
    if outcomes.is_sweep or not outcomes.failures:
        show_warnings(held_warnings)  # those for which there was no log
    return outcomes


def prepare_plugins(outcomes: JobOutcomes) -> None:
    """Make our launcher known to Hydra, and let conf/hydra/sweeper/optuna.yaml stand in place of the plugin's own.

    The launcher notes in `outcomes` what becomes of its jobs.
    """
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    from deepclust.cli.devices_launcher import DevicesLauncher

    DevicesLauncher.outcomes = outcomes
    Plugins.instance().register(DevicesLauncher)  # this also loads all plugins, which store their configurations
    stored: Any = ConfigStore.instance().repo
    stored.get("hydra", {}).get("sweeper", {}).pop("optuna.yaml", None)


def compose_own_help(verb: str, flags: Any) -> str | None:
    """Return the help of a verb; None where it has no configuration of ours, and Hydra knows more."""
    from deepclust.cli.main import VERBS
    from deepclust.cli.verb_help import compose_help, list_groups_of
    from deepclust.config.composition import CONFIG_PACKAGE, list_options

    groups = list_groups_of(verb, CONFIG_PACKAGE)
    options = {group: list_options(group, verb, None, []) for group in groups}
    for group, names in options.items():
        own = [] if flags.config_dir is None else Path(flags.config_dir, group).glob("*.yaml")
        names[:] = sorted({*names, *(file.stem for file in own)})
    return compose_help(verb, VERBS[verb], config_package=CONFIG_PACKAGE, options=options)


def run_job(
    verb: str,
    cfg: Any,
    run_folder: Path | None,
    *,
    on_begin: Callable[[], None],
    starts_garbage_collection: bool,
) -> Any:
    """Run one job: `main(cfg)` of the verb's module. An error is also written to error.txt in the run folder.

    `on_begin` is called once values, paths and numbers are accepted. The console script has turned off the garbage
    collector, which then starts once the job is loaded.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf.errors import OmegaConfBaseException

    from deepclust.config.early_input_checks import check_inputs
    from deepclust.config.explain_errors import explain_value_error
    from deepclust.config.plain_values import resolve_to_dict
    from deepclust.config.schema import check_plain_values
    from deepclust.engine.launch import keep_freed_memory, launched_rank, processes_exist
    from deepclust.runs.hydra_files import hide_environment_of_sweep, write_hydra_files
    from deepclust.runs.run_folder import RunFolderInUse

    keep_freed_memory()
    error_file = None if run_folder is None else run_folder / "error.txt"
    if error_file is not None and launched_rank() == 0:
        with storage_errors_explained(run_folder):
            error_file.unlink(missing_ok=True)
    try:
        try:
            if launched_rank() == 0:
                hide_environment_of_sweep()
            # Values that are missing or impossible, and paths with nothing there, are told before torch is imported.
            if run_folder is not None and verb in RUN_FOLDER_VERBS and launched_rank() == 0:
                with storage_errors_explained(run_folder):
                    write_hydra_files(run_folder, cfg, replace=False)
            values = resolve_to_dict(cfg)
            check_plain_values(values)
            check_inputs(verb, values, list(HydraConfig.get().overrides.task))
            on_begin()
            # Threads that wait sleep, instead of taking their CPU from other work, as OpenMP would let them. It reads
            # this once, when torch is imported. The results are the same.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            with notice_on_terminal(f"deepclust {verb}: loading ..."):
                module = importlib.import_module(f"deepclust.commands.{verb}")
            if starts_garbage_collection:
                if gc.get_freeze_count() == 0:  # what has been imported stays, and need not be looked through again
                    gc.freeze()
                gc.enable()
            with storage_errors_explained(run_folder):
                return module.main(cfg)
        except OmegaConfBaseException as error:
            raise explain_value_error(error) from error
    except Exception as error:
        is_told = isinstance(error, ProcessLost) and error.is_printed  # by the process that has failed
        if error_file is not None and not isinstance(error, RunFolderInUse) and not is_told:
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
    from deepclust.engine.output_files import write_text_once

    try:
        if write_text_once(error_file, text):
            return True
        time.sleep(1)  # the other process may still be writing
        return error_file.read_text(encoding="utf-8", errors="surrogateescape") != text
    except OSError:  # a full disk, perhaps the very error that is to be written; the caller prints it
        return True
