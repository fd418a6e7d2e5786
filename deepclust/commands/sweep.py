"""`deepclust sweep DIR`: the jobs of a sweep as a live table or as JSON, and another start of what failed.

The table is read from the folder alone, so the sweep may run on another machine.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from deepclust.cli.environment import JOBS_TO_START
from deepclust.config.override_format import format_override, format_value
from deepclust.engine.durations import format_duration
from deepclust.engine.plurals import format_count
from deepclust.engine.small_files import dict_or_empty, list_or_empty
from deepclust.errors import InputError
from deepclust.runs.provenance import HIDDEN
from deepclust.runs.sweep_jobs import Sweep, SweepJob, is_plain_sweep, read_sweep

SECONDS_BETWEEN_TABLES = 2.0
STATES_THAT_GO_ON = ("running", "waiting", "preempted")  # while a job is in one of them, there is something to watch
STATES_TO_RETRY = ("failed", "stopped", "preempted", "waiting")
STYLES = {"running": "cyan", "done": "green", "failed": "red", "stopped": "red", "preempted": "yellow"}
ROWS_BESIDE_JOBS = 4  # of the live table: its head, its line and the counts
WIDTH_OF_FILE = 160  # characters, where the output is no terminal


def main(cfg: DictConfig) -> None:
    """Show the jobs of a sweep once or live, or start some of them in place of this process."""
    folder = Path(cfg.sweep)
    sweep = read_sweep(folder)
    if cfg.json:
        print(json.dumps(to_json(sweep), indent=2))
    elif cfg.watch and cfg.retry is None and Console().is_terminal:
        watch(folder)
    else:
        Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILE).print(make_table(sweep))
    if cfg.retry is not None:
        retry(sweep)


def watch(folder: Path) -> None:
    """Show the table anew every SECONDS_BETWEEN_TABLES until all jobs are done, failed or stopped."""
    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            sweep = read_sweep(folder)
            goes_on = any(job.state in STATES_THAT_GO_ON for job in sweep.jobs)
            max_rows = console.height - ROWS_BESIDE_JOBS if goes_on else None
            live.update(make_table(sweep, max_rows=max_rows), refresh=True)
            if not goes_on:
                return
            time.sleep(SECONDS_BETWEEN_TABLES)


def make_table(sweep: Sweep, *, max_rows: int | None = None) -> RenderableType:
    """Return the table of the jobs, with at most `max_rows` of them: those that are done or wait are left out first."""
    jobs = sweep.jobs
    for state in ("done", "waiting"):
        if max_rows is not None and len(jobs) > max_rows:
            jobs = [job for job in jobs if job.state != state]
    keys = sweep.differing_keys
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", *map(escape, keys), "state"):
        table.add_column(name, overflow="fold")
    for name in ("epoch", "score", "images/s", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for job in jobs[:max_rows]:
        style = STYLES.get(job.state, "dim")
        values = [escape(job.overrides.get(key, "")) for key in keys]
        table.add_row(
            escape(job.name), *values, f"[{style}]{job.state}[/]", *format_progress(job), escape(describe_note(job))
        )
    counts = ", ".join(f"{count} {state}" for state, count in sweep.count_states().items())
    return Group(table, f"{format_count(len(sweep.jobs), 'job')}: {counts}")


def format_progress(job: SweepJob) -> tuple[str, str, str, str]:
    """Return epoch, score, images per second and time left of a job as texts, empty where they are unknown."""
    epoch = "" if job.epoch is None else f"{job.epoch}/{job.epochs}" if job.epochs else str(job.epoch)
    speed = "" if job.images_per_second is None else f"{job.images_per_second:,.0f}"
    left = "" if job.seconds_left is None else format_duration(job.seconds_left)
    return epoch, "" if job.score is None else f"{job.score:.3f}", speed, left


def describe_note(job: SweepJob) -> str:
    """Return what else is to be said of a job: its error, when it was last seen, or which score it has."""
    if job.error is not None:
        return job.error
    if job.state == "done" or job.heartbeat_age is None:
        return "" if job.score_name is None else job.score_name.rpartition("/")[2]
    seen = f"seen {format_duration(job.heartbeat_age)} ago" + (f" on {job.host}" if job.host else "")
    return f"{job.score_name.rpartition('/')[2]}, {seen}" if job.score_name else seen


def to_json(sweep: Sweep) -> dict[str, Any]:
    """Return what `json=true` prints."""
    jobs = [asdict(job) | {"folder": str(job.folder)} for job in sweep.jobs]
    return {
        "format": 1,
        "sweep": str(sweep.folder),
        "differing_keys": sweep.differing_keys,
        "states": sweep.count_states(),
        "jobs": jobs,
    }


def retry(sweep: Sweep) -> None:
    """Start what failed or is missing: this process becomes the command that the sweep was started with.

    Jobs that are done or run are left alone, and so are runs of other sweeps. A sweep that searches goes on with its
    search.

    Raises:
        InputError: if the folder does not say how the sweep was started.
    """
    jobs = [job for job in sweep.jobs if job.state in STATES_TO_RETRY]
    is_plain = is_plain_sweep(sweep.settings)
    numbers = [str(job.number) for job in jobs if job.number is not None]
    if not (numbers if is_plain else jobs):
        print("nothing to start", file=sys.stderr)
        return
    arguments, folder = compose_command(sweep)
    if is_plain:
        os.environ[JOBS_TO_START] = ",".join(numbers)
        print(f"starting {format_count(len(numbers), 'job')}", file=sys.stderr)
    else:
        print("going on with the search", file=sys.stderr)
    sys.stdout.flush()
    os.chdir(folder)
    program = "from deepclust.cli.main import main; raise SystemExit(main())"
    os.execv(sys.executable, [sys.executable, "-c", program, *arguments])


def compose_command(sweep: Sweep) -> tuple[list[str], Path]:
    """Return the arguments of the command that a sweep was started with, and the folder that it was started in.

    Raises:
        InputError: if the folder of the sweep does not say them.
    """
    job, runtime, overrides = (dict_or_empty(sweep.settings.get(name)) for name in ("job", "runtime", "overrides"))
    given = [str(word) for name in ("hydra", "task") for word in list_or_empty(overrides.get(name))]
    folder = Path(str(runtime.get("cwd", "")))
    reason = None
    if not given or None in (job.get("config_name"), job.get("name")):
        reason = f"{sweep.folder} does not say how the sweep was started"
    elif any(override.endswith(f"={HIDDEN}") for override in given):
        reason = "the sweep sets environment variables, whose values are written nowhere"
    elif not folder.is_dir():
        reason = f"the sweep was started in {folder}, which is not on this machine"
    if reason is not None:
        raise InputError(
            reason,
            expected="a sweep by Hydra's multirun, started from this machine",
            do=f"start its command again with {format_override('hydra.sweep.dir', str(sweep.folder))}",
        )
    sources = map(dict_or_empty, list_or_empty(runtime.get("config_sources")))
    own = [source for source in sources if source.get("provider") == "command-line"]
    flags = [flag for source in own for flag in ("--config-dir", str(source.get("path")))]
    verb = str(job.get("name"))
    if job["config_name"] != verb:
        flags += ["--config-name", str(job["config_name"])]
    kept = [word for word in given if not word.lstrip("+").startswith(("hydra.sweep.dir=", "hydra.mode="))]
    # In quotes where it needs them: with a comma it would be several folders.
    place = f"hydra.sweep.dir={format_value(str(sweep.folder.absolute()))}"
    return [verb, "-m", *flags, *kept, place], folder
