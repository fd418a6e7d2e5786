"""metrics.csv: every logged scalar by step."""

import csv
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsCsv(Logger):
    """Writes `folder`/metrics.csv with one row a step; a resumed run drops the rows after its checkpoint and goes on.

    (Lightning's own CSV logger starts a new file or repeats rows when a run is resumed.) The file is renewed once a
    second at most, and before every checkpoint.
    """

    def __init__(self, *, folder: Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.rows: dict[int, dict[str, Any]] = {}
        self.saved_at = 0.0
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = {int(row["step"]): {k: v for k, v in row.items() if v} for row in csv.DictReader(file)}

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
        self.rows = {at: row for at, row in self.rows.items() if at <= step}  # what a kill left beyond the checkpoint
        self.rows.setdefault(step, {"step": step}).update(metrics)
        if time.monotonic() - self.saved_at > 1:
            self.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    @rank_zero_only
    def save(self) -> None:
        columns = sorted({name for row in self.rows.values() for name in row} - {"step"})
        beside = self.path.with_suffix(".writing")
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", *columns])
            writer.writeheader()
            writer.writerows(self.rows.values())
        beside.replace(self.path)
        self.saved_at = time.monotonic()
