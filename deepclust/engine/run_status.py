"""`status.json` in a run folder: what a run does and how far it is, for those who watch it from outside.

The file is replaced as a whole. It is for watching only: no run reads it, and one that cannot write it goes on.
"""

import json
import math
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deepclust.engine.output_files import write_text
from deepclust.engine.small_files import read_json, read_json_object
from deepclust.errors import InputError

STATUS = "status.json"
STATUS_FORMAT = 1
MAX_BYTES = 2**16
SECONDS_BETWEEN_HEARTBEATS = 15.0
SECONDS_UNTIL_DEAD = 120.0  # without a heartbeat; a busy file system may hold up some of them

_writing = threading.Lock()  # the training and its heartbeats write from two threads


def read_status(folder: Path) -> dict[str, Any]:
    """Return the content of status.json, and an empty dictionary if there is none, or something else in its place."""
    file = folder / STATUS
    # On a file server a read fails whose file is replaced meanwhile; the next one does not.
    return read_json_object(file, max_bytes=MAX_BYTES) or read_json_object(file, max_bytes=MAX_BYTES)


def update_status(folder: Path, **values: Any) -> None:
    """Put values and the time into status.json; what else it holds stays. A number that is not finite becomes null.

    A file that the system does not let be read now is left as it is: what else it holds would be lost.
    """
    with _writing:
        try:
            status = read_json(folder / STATUS, max_bytes=MAX_BYTES)
        except (FileNotFoundError, ValueError):  # there is none, or something else in its place
            status = {}
        except OSError:
            return
        _write_status(folder, (status if isinstance(status, dict) else {}) | values)


@contextmanager
def run_state_recorded(folder: Path) -> Iterator[None]:
    """Keep the state of a run in status.json: `running` inside the `with` block, then how the block was left.

    The states after it are `done`, `failed` (an error), `stopped` (Ctrl-C) and `preempted` (a signal asked the run to
    stop, and the same command goes on). A process that is killed leaves `running`, and the time of its last heartbeat.
    """
    process = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
    with _writing:
        _write_status(folder, {"format": STATUS_FORMAT, "state": "running", **process})
    state = "failed"
    try:
        yield
        state = "done"
    except KeyboardInterrupt:
        state = "stopped"
        raise
    except SystemExit:  # what a signal becomes (deepclust.engine.signals)
        state = "preempted"
        raise
    finally:
        with _writing:  # this state is the last: it is written though nothing else can be read
            _write_status(folder, read_status(folder) | {"format": STATUS_FORMAT, "state": state, **process})


@contextmanager
def heartbeats_written(folder: Path) -> Iterator[None]:
    """Renew the time in status.json every so many seconds inside the `with` block, whatever takes how long in it."""
    has_ended = threading.Event()

    def beat() -> None:
        while not has_ended.wait(SECONDS_BETWEEN_HEARTBEATS):
            update_status(folder)

    beater = threading.Thread(target=beat, name="heartbeats", daemon=True)
    update_status(folder)
    beater.start()
    try:
        yield
    finally:
        has_ended.set()
        beater.join()


def read_last_heartbeat(folder: Path) -> float | None:
    """Return when status.json was last written, by the clock of its file system; None if there is none."""
    try:
        return (folder / STATUS).stat().st_mtime
    except OSError:
        return None


def read_file_system_clock(folder: Path) -> float:
    """Return the time that a file would get that is written in `folder` now, in seconds since 1970.

    Heartbeats are compared with it, since the clocks of two hosts may differ by minutes. What both write on a file
    server has the times of its clock.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # it has no name, or loses it at once
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # nothing can be written there
        return time.time()


def is_alive(status: dict[str, Any], *, heartbeat_age: float) -> bool:
    """Return whether the run of a status.json runs, as far as can be told from here.

    `heartbeat_age` is that of the newest heartbeat of the run, in seconds. On the host of the run, its process must be
    there.
    """
    if status.get("state") != "running" or heartbeat_age > SECONDS_UNTIL_DEAD:
        return False
    pid = status.get("pid")
    if status.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return True
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to somebody else
        return True
    return True


def _write_status(folder: Path, status: dict[str, Any]) -> None:
    """Write status.json if that is possible: on a full disk, or without the folder, the run itself says so later."""
    content = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in status.items()
    }
    with suppress(OSError, InputError):
        write_text(folder / STATUS, json.dumps(content | {"heartbeat": time.time()}) + "\n")
