"""The command line: `deepclust VERB [Hydra overrides]`; every verb is a Hydra application.

A verb is a line in VERBS, a module of its name with `main(cfg)`, and a root configuration of its name. The
module is imported when a job starts, so that help and configurations are shown without waiting for torch.
Exit codes: 0 done, 1 a fault of the program, 2 the user can mend it, 130 interrupted.
"""

import contextlib
import errno
import importlib
import io
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepclust import __version__
from deepclust.errors import InputError

VERBS = {
    "cluster": "a folder of images to clusters, pictures and a model: images=DIR num_clusters=K (or auto)",
    "train": "fit, cluster, score, write the run folder",
    "evaluate": "the same scores from a finished run: run=DIR",
    "predict": "clusters for new images with a trained run: run=DIR images=FOLDER_OR_ARRAY output=FILE.csv",
    "export": "a trained run for use without this package: run=DIR format=torchscript|onnx|safetensors output=FILE",
    "features": "features of a data set, kept as data: run=DIR, or dataset=NAME backbone=NAME",
    "compare": "many runs -> one table: runs=DIR",
}
HELP = """\
deepclust: deep image clustering

usage: deepclust VERB [KEY=VALUE ...] [flags]

{verbs}

deepclust VERB --help        groups and keys that can be overridden
deepclust VERB --cfg job     the configuration that would run
deepclust VERB -m KEY=A,B    one job for each value
deepclust --version          the version"""
PATHS = {
    *("images", "run", "runs", "output", "sort_to", "start", "data_dir", "dataset.path", "dataset.root"),
    *("backbone.weights", "hydra.run.dir", "hydra.sweep.dir"),
}  # keys whose values are taken as they are typed
FULL_ERROR = "HYDRA_FULL_ERROR"  # 1: Hydra raises instead of printing, and we show a traceback to the user


def main() -> int:
    """Run the verb that the command line names; the exit code."""
    full_error = os.environ.get(FULL_ERROR) == "1"
    try:
        return _dispatch(sys.argv[1:])
    except InputError as error:
        if full_error:
            traceback.print_exception(error)
        from deepclust import launch

        if not (launch.rank() if error.told is None else error.told):
            _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {verb:<9} {text}" for verb, text in VERBS.items())))
        return 0
    if "--version" in arguments:
        print(f"deepclust {__version__}")
        return 0
    verb, *rest = arguments
    if verb in ("-sc", "--shell-completion"):
        return _complete(arguments)
    if verb not in VERBS:
        from deepclust.config import nearest

        meant = nearest(verb, VERBS)
        raise InputError(
            f"there is no verb {verb!r}",
            expected=f"one of {', '.join(VERBS)}",
            do=f"write deepclust {meant}" if meant else "write it first, as in deepclust train method=propos",
        )
    return _run(verb, rest)


def _complete(arguments: list[str]) -> int:
    """Shell completion is installed once for all verbs; the line typed so far says which one is meant."""
    typed = re.match(r"\s*(\S+)\s+(\S+)(\s.*)", os.environ.get("COMP_LINE", ""))
    if not any(argument.startswith("query=") for argument in arguments):
        return _run("train", arguments)
    if typed is None or typed[2] not in VERBS:
        print("\n".join(VERBS))
        return 0
    with _environment("COMP_LINE", typed[1] + typed[3]):
        return _run(typed[2], arguments)


@dataclass
class _Jobs:
    """What became of the jobs that ran in this process."""

    folders: list[Path] = field(default_factory=list)
    failures: list[tuple[Path, Exception]] = field(default_factory=list)
    multirun: bool = False


class JobFailed(Exception):
    """A job's failure on its way to the process that launched it: summary, exit code, traceback if wanted."""


def _run(verb: str, arguments: list[str]) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from deepclust.config import COMPOSITION_ERRORS, CONFIGS, VERSION_BASE, explain

    arguments = [quote_path(a, sweeps=bool({"-m", "--multirun"} & {*arguments})) for a in arguments]
    flags = _flags(verb, arguments)
    composed_from = {
        "config_name": flags.config_name or verb,
        "config_dir": flags.config_dir,
        "overrides": flags.overrides,
    }
    _check_flags(flags, composed_from)
    users_choice = os.environ.get(FULL_ERROR)
    process = os.getpid()
    jobs = _Jobs()

    def task(cfg: DictConfig) -> Any:
        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir)
        jobs.multirun = settings.mode == RunMode.MULTIRUN
        jobs.folders.append(folder)
        with _environment(FULL_ERROR, users_choice), _warnings_in_log(held):
            try:
                return _work(verb, cfg, folder if settings.output_subdir is not None else None)
            except Exception as error:
                jobs.failures.append((folder, error))
                if not jobs.multirun:
                    return None  # raised below: Hydra would print its own lines first
                known = isinstance(error, InputError) and users_choice != "1"
                trace = "" if known else "".join(traceback.format_exception(error))
                text = f"job {settings.job.num} ({' '.join(settings.overrides.task)}): {_summary(error)}"
                # This process's plain sweep goes on; a distant launcher or a searching sweeper must know.
                if os.getpid() == process and settings.sweeper._target_.endswith(".BasicSweeper"):
                    if not getattr(error, "told", False):
                        sys.stderr.write(trace)
                        _say(f"error: {text}")
                    return None
                raise JobFailed(text, _code(error), trace) from None

    task.__module__ = f"deepclust.{verb}"  # where Hydra finds the name of the job
    configs = f"pkg://{CONFIGS}"
    application = hydra.main(version_base=VERSION_BASE, config_path=configs, config_name=verb)(task)
    program = "deepclust" if flags.shell_completion else f"deepclust {verb}"
    try:
        with (
            _arguments([program, *arguments]),
            _environment(FULL_ERROR, "1"),
            warnings.catch_warnings(record=True) as held,
        ):
            application()
    except SystemExit as end:  # after --help
        if end.code:
            raise
    except JobFailed as failed:
        text, code, trace = failed.args
        if not jobs.failures:  # it ran elsewhere
            sys.stderr.write(trace)
            _say(f"error: {text}")
            return code
    except BrokenPipeError:  # the reader of --help, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except COMPOSITION_ERRORS as error:
        explained = explain(error, command=f"deepclust {verb}", **composed_from)
        if not jobs.failures:
            raise explained from error
        _say(f"error: {explained}")
    code = _account(jobs)
    for warning in held:  # where there was no log to write them to
        warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)
    return code


def _work(verb: str, cfg: Any, run_folder: Path | None) -> Any:
    """One job: `main` of the verb's module. The last error of a run stays in its folder as error.txt."""
    from omegaconf.errors import OmegaConfBaseException

    from deepclust import launch
    from deepclust.config import check_numbers, explain_value, plain

    launch.keep_freed_memory()
    note = None if run_folder is None else run_folder / "error.txt"
    if note is not None and launch.rank() == 0:
        with _storage_explained(run_folder):
            note.unlink(missing_ok=True)
    try:
        try:
            check_numbers(plain(cfg))  # what is missing or cannot be is said before torch is imported
            with _shown(f"deepclust {verb}: loading ..."):
                module = importlib.import_module(f"deepclust.{verb}")
            with _storage_explained(run_folder):
                return module.main(cfg)
        except OmegaConfBaseException as error:
            raise explain_value(error) from error
    except Exception as error:
        if note is not None:
            known = isinstance(error, InputError)
            text = f"{error}\n" if known else "".join(traceback.format_exception(error))
            told = not _write_first(note, text)
            if isinstance(error, InputError):
                error.told = told
        raise


def _write_first(note: Path, text: str) -> bool:
    """Write down an error, if that can be; False where another process of the run has written the same."""
    try:
        with note.open("x", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
    except FileExistsError:
        time.sleep(1)  # the other may be writing
        return note.read_text(encoding="utf-8", errors="surrogateescape") != text
    except OSError:  # a full disk, perhaps the very error; who called tells it
        pass
    return True


@contextlib.contextmanager
def _storage_explained(run_folder: Path | None) -> Iterator[None]:
    """What the system says of a full or closed disk, as an error that the user can mend."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.errno not in (errno.EROFS, errno.EACCES):
            raise
        again = "start the same command again"
        if run_folder is not None:
            again += " in the same folder: training goes on from the last checkpoint"
        raise InputError(
            f"{error.strerror}: {(full and error.filename2) or error.filename or run_folder or Path.cwd()}",
            expected="room for what is written" if full else "permission to read and write there",
            do=f"{'free space' if full else 'give it, or name another place,'} and {again}",
        ) from error


def _account(jobs: _Jobs) -> int:
    if not jobs.failures:
        return 0
    if not jobs.multirun:
        raise jobs.failures[0][1]
    place = os.path.relpath(os.path.commonpath([folder for folder, _ in jobs.failures]))
    text = InputError(
        f"{len(jobs.failures)} of {len(jobs.folders)} jobs failed",
        expected="none",
        do=f"read the lines above; run folders have them as error.txt, below {place}",
    )
    _say(f"error: {text}")
    return min(_code(error) for _, error in jobs.failures)


def quote_path(argument: str, *, sweeps: bool) -> str:
    """KEY=PATH as Hydra's grammar takes it for one text; what is no path, or says more than one, stays as it is."""
    key, _, value = argument.partition("=")
    plain = re.fullmatch(r"[A-Za-z0-9_/.-]*", value)
    own_words = value.startswith(("'", '"', "[")) or "${" in value or (sweeps and "," in value)
    if key.lstrip("+") not in PATHS or plain or own_words:
        return argument
    escaped = re.sub(r"(\\*)'", r"\1\1\'", value)  # a backslash counts before a quote only
    return f"{key}='{escaped}'"


def _flags(verb: str, arguments: list[str]) -> Any:
    """The command line as Hydra will read it."""
    from hydra._internal.utils import get_args_parser

    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return get_args_parser().parse_args(arguments)
    except SystemExit:
        raise InputError(
            said.getvalue().strip().rpartition("error: ")[2],
            expected="overrides next to each other, before or after Hydra's flags",
            do=f"see deepclust {verb} --hydra-help",
        ) from None


def _check_flags(flags: Any, composed_from: dict[str, Any]) -> None:
    """Say what Hydra would say in more than a line."""
    if flags.config_dir is not None and not Path(flags.config_dir).is_dir():
        raise InputError(
            f"--config-dir {flags.config_dir} is no folder",
            expected="a folder with groups of configurations, such as method/mine.yaml",
            do="correct the path",
        )
    if flags.package not in (None, "_global_"):
        from deepclust.config import known_keys, nearest

        _, keys = known_keys(**composed_from)
        if keys and flags.package not in keys:
            raise InputError(
                f"--package {flags.package} is not in the configuration",
                expected=nearest(flags.package, keys) or "the dotted name of a section",
                do="correct the name",
            )


def _summary(error: Exception) -> str:
    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def _code(error: Exception) -> int:
    return 2 if isinstance(error, InputError) else 1


def _say(text: str) -> None:
    print(f"deepclust: {' '.join(text.split())}", file=sys.stderr)


@contextlib.contextmanager
def _shown(text: str) -> Iterator[None]:
    """The text on a terminal for a while, where whatever else is written overwrites it; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    print(text, end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(" " * len(text), end="\r", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """The environment's variable set, or unset, for a while."""
    before = os.environ.get(name)
    _set(name, value)
    try:
        yield
    finally:
        _set(name, before)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextlib.contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _warnings_in_log(held: list[warnings.WarningMessage]) -> Iterator[None]:
    """Warnings go to the job's log, if any, those held back first: standard error is for errors."""
    if not logging.root.handlers:
        yield
        return
    logging.captureWarnings(True)
    try:
        for warning in held:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)
        held.clear()
        yield
    finally:
        logging.captureWarnings(False)
