"""What the command that launched a sweep says of a job that ended without a result, in one line."""

import re
from pathlib import Path

from deepclust.errors import ProcessLost
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
    return ProcessLost(
        f"job {found['job']} has ended without a result: {read_end(path, found)}",
        do=f"read the logs in {path.parent}; the same command with hydra.sweep.dir={folder} goes on",
        exit_code=PROCESS_LOST,
    )


def read_end(path: Path, found: re.Match[str]) -> str:
    """Return how the job's processes ended: in the words of srun, else of Slurm's accounting."""
    errors = path.with_name(f"{found['job']}_0_log.err")
    lines = SRUN_LINE.findall(errors.read_text(errors="replace")) if errors.exists() else []
    if lines:
        node, end = lines[-1]
        return f"{end} on {node}"
    return f"task {found['task']}: {found['state']}"
