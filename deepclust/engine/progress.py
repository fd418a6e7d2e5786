"""How far a piece of work is, and how long it will take: a bar on a terminal, a line now and then elsewhere.

On standard output, by rank 0, and only once the work has lasted: what ends soon leaves nothing. Works may lie within
each other. Showing them reads a clock at each step and nothing of what is computed.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

from deepclust.engine import distributed

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")

BAR_AFTER, LINE_AFTER = 1.0, 5.0  # seconds that work lasts before it is shown
BAR_EVERY, LINE_EVERY = 0.5, 30.0  # seconds between two looks

_bars: "Progress | None" = None  # a terminal holds one live display, so works within others add a bar to it
_line_at = -float("inf")  # when any work wrote the last line: however many there are, a log stays short


def track(
    items: Iterable[T], what: str, total: int | None = None, *, size: Callable[[T], int] | None = None
) -> Iterator[T]:
    """The items, while it is shown how many of `total` are used; `size` says what an item counts, else 1."""
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    work = Work(what, total)
    try:
        for item in items:
            yield item
            work.reach(work.done + (1 if size is None else size(item)))
    finally:
        work.close()


class Work:
    """`total` steps of which `done` were done before; whoever begins it closes it, also after an error."""

    def __init__(self, what: str, total: int, *, done: int = 0, line_every: float = LINE_EVERY) -> None:
        self.what, self.total, self.done, self.line_every = what, total, done, line_every
        self.begun_with, self.began_at = done, time.monotonic()
        self.looked_at = -float("inf")
        self.bar: TaskID | None = None

    def reach(self, done: int, note: Callable[[], str] = str) -> None:
        """So many steps are done; `note` is asked for more to say only when something is shown."""
        global _line_at
        self.done, now = done, time.monotonic()
        if now - self.looked_at < BAR_EVERY or done >= self.total or distributed.rank() > 0:
            return
        self.looked_at = now
        lasted = now - self.began_at
        left = lasted / max(done - self.begun_with, 1) * (self.total - done)
        if _bars is not None or is_terminal():  # a live display stands in for sys.stdout
            if lasted >= BAR_AFTER:
                self.draw(f"{duration(left)} left", note())
        elif lasted >= LINE_AFTER and now - _line_at >= self.line_every:
            _line_at = now
            print(
                "  ".join(filter(None, [f"{self.what} {done / self.total:4.0%}", note(), f"{duration(left)} left"])),
                flush=True,
            )

    def draw(self, left: str, note: str) -> None:
        global _bars
        if _bars is None:
            _bars = new_bars()
            _bars.start()
        if self.bar is None:
            self.bar = _bars.add_task(self.what, total=self.total, completed=self.done, left=left, note=note)
        _bars.update(self.bar, completed=self.done, left=left, note=note)

    def close(self) -> None:
        """Take its bar away."""
        global _bars
        if _bars is not None and self.bar is not None:
            _bars.remove_task(self.bar)
            if not _bars.tasks:
                _bars.stop()
                _bars = None
        self.bar = None


def is_terminal() -> bool:
    """Whether standard output can redraw a line."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def new_bars() -> "Progress":
    """An empty live display."""
    from rich.progress import BarColumn, Progress, TextColumn  # costs a tenth of a second, and few commands need it

    texts = ["{task.description}", "{task.percentage:.0f} %", "{task.fields[left]}", "{task.fields[note]}"]
    what, *rest = (TextColumn(text, markup=False) for text in texts)
    return Progress(what, BarColumn(), *rest, transient=True, refresh_per_second=4)


def duration(seconds: float) -> str:
    """About how long, in the unit that suits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
