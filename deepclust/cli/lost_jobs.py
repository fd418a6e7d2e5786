"""What the command that launched a sweep says of its launcher, or of a job that ended without a result, in one line."""

import re
import traceback
from pathlib import Path
from typing import Any

from deepclust.config.override_format import format_override
from deepclust.errors import InputError, ProcessLost
from deepclust.exit_codes import PROCESS_LOST

SUBMITIT_TEXT = re.compile(
    r"Job (?P<job>\S+) \(task: (?P<task>\d+)\) with path (?P<path>.+)\n.*\(state: (?P<state>.*)\)"
)
SRUN_LINE = re.compile(r"^srun: error: (?P<node>[^:]+): (?P<end>tasks? \S+: .+)$", re.MULTILINE)


def explain_lost_job(error: Exception) -> ProcessLost | None:
    """Return the one line for submitit's error of a job without a result; None for any other error.

    submitit shows the end of one stream, which need not be that of the process that has failed. srun knows it, and
    writes it into the stream of task 0.
    """
    if type(error).__name__ != "UncompletedJobError" or (found := SUBMITIT_TEXT.search(str(error))) is None:
        return None
    path = Path(found["path"])
    folder = next((str(parent.parent) for parent in path.parents if parent.name == ".submitit"), "SAME")
    same = format_override("hydra.sweep.dir", folder)
    return ProcessLost(
        f"job {found['job']} has ended without a result: {read_end(path, found)}",
        do=f"read the logs in {path.parent}; the same command with {same} goes on",
        exit_code=PROCESS_LOST,
    )


def explain_launcher_error(error: Exception) -> InputError | None:
    """Return the one line for an error of the launcher's own; None for one of a configuration or of the sweep's folder.

    A launcher composes the configurations of its jobs, whose errors have types of their own, and makes their folders.
    Hydra's plain launcher does nothing else.
    """
    from hydra.plugins.launcher import Launcher

    if type(error).__module__.split(".")[0] in ("hydra", "omegaconf", "yaml"):
        return None
    owners = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    launcher: Any = next((owner for owner in owners if isinstance(owner, Launcher)), None)
    if launcher is None or type(launcher).__name__ == "BasicLauncher":  # Hydra loads its plugins anew: a name stays
        return None
    folder = launcher.config.hydra.sweep.dir if launcher.config is not None else ""
    if isinstance(error, OSError) and folder and str(error.filename).startswith(str(folder)):
        return None
    return InputError(
        f"{type(launcher).__name__} has failed: {type(error).__name__}: {' '.join(str(error).split())}",
        expected="a launcher that can start jobs here",
        do="mend that, change hydra.launcher, or choose another, such as hydra/launcher=devices",
    )


def read_end(path: Path, found: re.Match[str]) -> str:
    """Return how the job's processes ended: in the words of srun, else of Slurm's accounting."""
    errors = path.with_name(f"{found['job']}_0_log.err")
    lines = SRUN_LINE.findall(errors.read_text(errors="replace")) if errors.exists() else []
    if lines:
        node, end = lines[-1]
        return f"{end} on {node}"
    return f"task {found['task']}: {found['state']}"
