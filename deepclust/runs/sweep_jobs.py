"""The jobs of a sweep and their states, read from its folder without changing anything there.

The folder may be one that another machine writes to. Reading it needs no torch and no GPU.
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from deepclust.comparison.finished_runs import find_run_folders, read_overrides
from deepclust.engine.run_status import STATUS, is_alive, read_file_system_clock, read_last_heartbeat, read_status
from deepclust.engine.small_files import is_finite_number, read_json_object, read_small_text, read_yaml
from deepclust.errors import InputError
from deepclust.runs.hydra_files import SWEEP_FILE
from deepclust.runs.run_folder import CHECKPOINT, ERROR, RESULTS

JobState = Literal["running", "done", "failed", "preempted", "stopped", "waiting"]
STATES: tuple[JobState, ...] = get_args(JobState)
INNER_STATUS_FILES = (f"*/{STATUS}", f"*/*/{STATUS}")  # of earlier stages, and of the trainings of `deepclust cluster`
FIRST_LINE_OF_ERROR = re.compile(r"[A-Za-z_][\w.]*(:|$)")  # below the indented lines of a traceback


@dataclass(frozen=True)
class SweepJob:
    """A job of a sweep, as its folder shows it.

    Attributes:
        name: of its folder, seen from that of the sweep.
        number: in the sweep; None for a run that is not known to be of it, such as one of an earlier sweep.
        overrides: its values by key.
        state: `waiting` has not begun; `preempted` was asked to stop by a signal, and `stopped` by Ctrl-C or a kill.
        epoch: of the training, as many as are done.
        epochs: of the training in all.
        score_name: which score without labels `score` is.
        heartbeat_age: seconds since the run last wrote that it is alive.
        error: what has gone wrong, in one line.
    """

    name: str
    folder: Path
    overrides: dict[str, str]
    state: JobState
    number: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    score_name: str | None = None
    score: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    heartbeat_age: float | None = None
    host: str | None = None
    pid: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep: its jobs, those that have not begun included as far as they are known.

    Attributes:
        settings: the section `hydra` of the configuration that the sweep was started with; empty if it is not there.
    """

    folder: Path
    jobs: list[SweepJob]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def differing_keys(self) -> list[str]:
        """The keys whose values are not those of all jobs."""
        keys = list(dict.fromkeys(key for job in self.jobs for key in job.overrides))
        return [key for key in keys if len({job.overrides.get(key) for job in self.jobs}) > 1]

    def count_states(self) -> dict[JobState, int]:
        """Return how many jobs are in each state, without the states that none is in."""
        counts = Counter(job.state for job in self.jobs)
        return {state: counts[state] for state in STATES if counts[state]}


def read_sweep(folder: Path) -> Sweep:
    """Read the jobs of a sweep from its folder.

    Raises:
        InputError: if there is no such folder, or nothing of a sweep in it.
    """
    settings = read_sweep_settings(folder)
    found = {path: read_overrides_of_run(path) for path in find_run_folders(folder)} if folder.is_dir() else {}
    planned = list_planned_jobs(settings)
    if not found and not planned:
        raise InputError(
            f"{folder} holds no run" if folder.is_dir() else f"there is no folder {folder}",
            expected="the folder of a sweep, such as multirun/DATE/TIME",
            do="check sweep=DIR",
        )
    now = read_file_system_clock(folder)
    sweep = settings.get("sweep")
    are_numbered = isinstance(sweep, dict) and str(sweep.get("subdir")).startswith("${job_folder:")  # conf/train.yaml
    jobs, others = list[SweepJob](), dict(found)
    for number, overrides in enumerate(planned):
        own = folder / str(number)
        same = [path for path in others if found[path] == overrides]
        path = own if are_numbered or own in same or not same else same[0]
        is_taken = bool(found.get(path)) and sorted(found[path]) != sorted(overrides)
        if is_taken and are_numbered:
            error = f"its folder holds a run of other values: {' '.join(found[path])}"
            job = SweepJob(path.name, path, split_overrides(overrides), "failed", error=error)
        elif is_taken:  # it has begun nowhere
            job = SweepJob(path.name, path, split_overrides(overrides), "waiting")
        else:
            job = read_job(folder, path, overrides, now=now)
        jobs.append(replace(job, number=number))
        if are_numbered or not is_taken:
            others.pop(path, None)
    jobs += [read_job(folder, path, found[path], now=now) for path in sorted(others, key=sort_key)]
    return Sweep(folder, jobs, settings)


def sort_key(path: Path) -> list[tuple[int, str]]:
    """Return what sorts folders by the numbers in their names."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", str(path))]


def read_sweep_settings(folder: Path) -> dict[str, Any]:
    """Return the section `hydra` of multirun.yaml; empty if there is none that can be read."""
    try:
        content = read_yaml(folder / SWEEP_FILE)
    except (OSError, ValueError):
        return {}
    settings = content.get("hydra") if isinstance(content, dict) else None
    return settings if isinstance(settings, dict) else {}


def read_overrides_of_run(folder: Path) -> list[str]:
    """Return the overrides of a run; none if they cannot be read."""
    try:
        return [str(override) for override in read_overrides(folder / ".hydra" / "overrides.yaml")]
    except (OSError, ValueError):
        return []


def split_overrides(overrides: list[str]) -> dict[str, str]:
    """Return the values of overrides by their keys."""
    pairs = (override.lstrip("+").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def list_planned_jobs(settings: dict[str, Any]) -> list[list[str]]:
    """Return the overrides of each job that Hydra's plain sweeper makes of these settings; none for other sweepers."""
    if not is_plain_sweep(settings):
        return []
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        parameters = [f"{key}={value}" for key, value in (settings["sweeper"].get("params") or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*parameters, *settings["overrides"]["task"]])
        return BasicSweeper.split_arguments(parsed, None)[0]
    except Exception:  # Hydra's parser raises many kinds of errors; the folders of jobs that have begun are shown
        return []


def is_plain_sweep(settings: dict[str, Any]) -> bool:
    """Return whether a sweep has a job for each of its values, and does not search among them."""
    sweeper = settings.get("sweeper")
    return isinstance(sweeper, dict) and str(sweeper.get("_target_")).endswith(".BasicSweeper")


def read_job(sweep_folder: Path, folder: Path, overrides: list[str], *, now: float) -> SweepJob:
    """Read the state of one job from its folder; `now` is the time by the clock of the file system."""
    status, error = read_status(folder), read_error(folder)
    inner = [path.parent for pattern in INNER_STATUS_FILES for path in folder.glob(pattern)]
    heartbeats = {place: time for place in (folder, *inner) if (time := read_last_heartbeat(place)) is not None}
    newest = max(heartbeats, key=heartbeats.__getitem__, default=folder)
    heartbeat_age = max(0.0, now - heartbeats[newest]) if heartbeats else None
    results = read_json_object(folder / RESULTS)
    state = find_state(folder, status, results, heartbeat_age=heartbeat_age or 0.0, error=error)
    progress = read_status(newest) if state == "running" else dict(status)
    if state == "done":
        progress |= describe_results(results)
    epoch, epochs = (read_number(progress, key) for key in ("epoch", "epochs"))
    pid = read_number(status, "pid")
    return SweepJob(
        name=str(folder.relative_to(sweep_folder)),
        folder=folder,
        overrides=split_overrides(overrides),
        state=state,
        epoch=None if epoch is None else int(epoch),
        epochs=None if epochs is None else int(epochs),
        score_name=str(progress["score_name"]) if "score_name" in progress else None,
        score=read_number(progress, "score"),
        images_per_second=read_number(progress, "images_per_second"),
        seconds_left=read_number(progress, "seconds_left") if state == "running" else None,
        heartbeat_age=heartbeat_age,
        host=str(status["host"]) if "host" in status else None,
        pid=None if pid is None else int(pid),
        error=error if state == "failed" else None,
    )


def find_state(
    folder: Path, status: dict[str, Any], results: dict[str, Any], *, heartbeat_age: float, error: str | None
) -> JobState:
    """Return the state of a job from what its folder holds."""
    if results.get("format") == 1:  # it is written last
        return "done"
    if is_alive(status, heartbeat_age=heartbeat_age):
        return "running"
    if error is not None or status.get("state") == "failed":
        return "failed"
    if status.get("state") == "preempted":
        return "preempted"
    return "stopped" if status or (folder / CHECKPOINT).exists() else "waiting"


def describe_results(results: dict[str, Any]) -> dict[str, Any]:
    """Return what a finished run has in place of its progress."""
    objective = results.get("objective")
    timing = results.get("timing")
    known: dict[str, Any] = {"epoch": results.get("epochs"), "epochs": results.get("epochs")}
    if isinstance(objective, dict):
        known |= {"score": objective.get("value"), "score_name": objective.get("name")}
    if isinstance(timing, dict):
        known["images_per_second"] = timing.get("images_per_second")
    return known


def read_error(folder: Path) -> str | None:
    """Return what error.txt says in one line; None if there is none."""
    try:
        text = read_small_text(folder / ERROR, errors="replace")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"{ERROR} cannot be read: {error}"
    return summarize_traceback(text)


def summarize_traceback(text: str) -> str:
    """Return the error at the end of a traceback, or of any other text, as one line."""
    lines = text.strip().splitlines() or [""]
    is_traceback = lines[0].startswith("Traceback")
    first = next((i for i in reversed(range(len(lines))) if FIRST_LINE_OF_ERROR.match(lines[i])), len(lines) - 1)
    return " ".join(" ".join(lines[first:] if is_traceback else lines).split())


def read_number(values: dict[str, Any], key: str) -> float | None:
    """Return a number of a status.json or results.json; None if it is missing or not finite."""
    value = values.get(key)
    return value if is_finite_number(value) else None
