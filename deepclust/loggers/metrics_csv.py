"""A logger that writes metrics.csv: one row per step, one column per logged value."""

import csv
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from deepclust.engine.output_files import replace_text_file
from deepclust.errors import InputError

MAX_STEP = 2**53  # up to which a float tells one step from the next


class MetricsCsv(Logger):
    """Writes `folder`/metrics.csv; a resumed run drops the rows after its checkpoint and continues the file.

    Lightning's own CSV logger starts a new file, or repeats rows, when a run is resumed. The file is written at most
    once a second, and before every checkpoint.
    """

    def __init__(self, *, folder: Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.rows: dict[int, dict[str, Any]] = {}
        self.last_saved_at = 0.0
        if self.path.exists():
            self.rows = read_rows(self.path)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        # A run that was killed may have left rows of steps after the checkpoint from which it is resumed.
        self.rows = {row_step: row for row_step, row in self.rows.items() if row_step <= step}
        self.rows.setdefault(step, {"step": step}).update(metrics)
        if time.monotonic() - self.last_saved_at > 1:
            self.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    @rank_zero_only
    def save(self) -> None:
        columns = sorted({name for row in self.rows.values() for name in row} - {"step"})
        with replace_text_file(self.path) as file:
            writer = csv.DictWriter(file, ["step", *columns])
            writer.writeheader()
            writer.writerows(self.rows.values())
        self.last_saved_at = time.monotonic()


def read_rows(file: Path) -> dict[int, dict[str, Any]]:
    """Return the rows of a metrics.csv by their steps, each without its empty cells.

    Raises:
        InputError: if the file is not as this logger wrote it.
    """
    rows: dict[int, dict[str, Any]] = {}
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                cells = {name: text for name, text in row.items() if text}
                for text in cells.values():
                    float(text)  # or it is no number
                step = int(row["step"])
                if not 0 <= step < MAX_STEP:
                    raise ValueError(f"{step} is no step")
                rows[step] = cells
    except (LookupError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"{file} is not as deepclust wrote it: {' '.join(str(error).split())[:200] or type(error).__name__}",
            expected="a column step, and numbers",
            do="bring back a copy, or remove it: the curves then begin where the run goes on",
        ) from error
    return rows
