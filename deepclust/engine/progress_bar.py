"""Shows how far a long piece of work is and how long it will take: a bar on a terminal, lines elsewhere.

Process 0 writes to standard output, and only after the work has lasted a while, so that short work shows nothing. One
piece of work may contain another. Showing progress reads a clock at each step and nothing of what is computed.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from deepclust.engine import distributed
from deepclust.engine.durations import format_duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")

SECONDS_BEFORE_BAR, SECONDS_BEFORE_LINE = 1.0, 5.0  # that work must have lasted before it is shown
SECONDS_BETWEEN_UPDATES, SECONDS_BETWEEN_LINES = 0.5, 30.0

_live_display: "Progress | None" = None  # a terminal can hold one, so all pieces of work share it
_last_line_at = -float("inf")  # of all pieces of work together, so that a log stays short however many there are


def track(
    items: Iterable[T], description: str, total: int | None = None, *, size: Callable[[T], int] | None = None
) -> Iterator[T]:
    """Yield `items` and show how far through them the caller is.

    Args:
        items: what to iterate over.
        description: what is shown as the name of the work.
        total: the sum of the sizes of all items; None: their number.
        size: gives the size of an item; None: 1 for each.
    """
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    meter = ProgressMeter(description, total)
    try:
        for item in items:
            yield item
            meter.update(meter.done + (1 if size is None else size(item)))
    finally:
        meter.close()


@contextmanager
def announce(description: str) -> Iterator[None]:
    """Say now and then that work goes on inside the `with` block that cannot tell how far it is.

    The first line comes after the seconds after which `track` shows one, so that short work shows nothing.
    """
    if distributed.rank() > 0:
        yield
        return
    has_ended, started_at = threading.Event(), time.monotonic()

    def tell() -> None:
        seconds = SECONDS_BEFORE_LINE
        while not has_ended.wait(seconds):
            print(f"{description}: {format_duration(time.monotonic() - started_at)} so far", flush=True)
            seconds = SECONDS_BETWEEN_LINES

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        has_ended.set()
        teller.join()


class ProgressMeter:
    """Shows the progress of work of `total` steps, of which `done` were done before. It must be closed in the end."""

    def __init__(
        self, description: str, total: int, *, done: int = 0, seconds_between_lines: float = SECONDS_BETWEEN_LINES
    ) -> None:
        self.description = description
        self.total = total
        self.done = done
        self.seconds_between_lines = seconds_between_lines
        self.initially_done, self.started_at = done, time.monotonic()
        self.last_updated_at = -float("inf")
        self.bar: TaskID | None = None

    def update(self, done: int, make_status: Callable[[], str] = str) -> None:
        """Say that `done` steps are done; `make_status` gives a text to show beside them, called only when needed."""
        global _last_line_at
        self.done, now = done, time.monotonic()
        if now - self.last_updated_at < SECONDS_BETWEEN_UPDATES or done >= self.total or distributed.rank() > 0:
            return
        self.last_updated_at = now
        elapsed = now - self.started_at
        remaining = elapsed / max(done - self.initially_done, 1) * (self.total - done)
        time_left = f"{format_duration(remaining)} left"
        if _live_display is not None or is_terminal():  # while a display is live, it takes the place of sys.stdout
            if elapsed >= SECONDS_BEFORE_BAR:
                self._draw_bar(time_left, make_status())
        elif elapsed >= SECONDS_BEFORE_LINE and now - _last_line_at >= self.seconds_between_lines:
            _last_line_at = now
            texts = [f"{self.description} {done / self.total:4.0%}", make_status(), time_left]
            print("  ".join(filter(None, texts)), flush=True)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        global _live_display
        if _live_display is not None and self.bar is not None:
            _live_display.remove_task(self.bar)
            if not _live_display.tasks:
                _live_display.stop()
                _live_display = None
        self.bar = None

    def _draw_bar(self, time_left: str, status: str) -> None:
        global _live_display
        if _live_display is None:
            _live_display = make_live_display()
            _live_display.start()
        fields: dict[str, Any] = {"completed": self.done, "time_left": time_left, "status": status}
        if self.bar is None:
            self.bar = _live_display.add_task(self.description, total=self.total, **fields)
        _live_display.update(self.bar, **fields)


def is_terminal() -> bool:
    """Return whether standard output is a terminal that can redraw a line."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def make_live_display() -> "Progress":
    """Return a display of progress bars, without any bar yet."""
    from rich.progress import BarColumn, Progress, TextColumn  # costs a tenth of a second, and few commands need it

    templates = ["{task.description}", "{task.percentage:.0f} %", "{task.fields[time_left]}", "{task.fields[status]}"]
    description, *others = (TextColumn(template, markup=False) for template in templates)
    return Progress(description, BarColumn(), *others, transient=True, refresh_per_second=4)
