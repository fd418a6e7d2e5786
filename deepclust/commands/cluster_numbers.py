"""Several numbers of clusters in one call of `deepclust cluster`: the features are the same, the report has tabs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepclust.engine.output_files import write_text
from deepclust.engine.plurals import format_count
from deepclust.report.tabs import MARK, join_reports
from deepclust.runs.run_folder import REPORT

OTHER_NUMBERS = "numbers"  # folder of a run, with a run folder for each number but the first


def list_numbers(num_clusters: Any) -> list[Any]:
    """Return the numbers of clusters that are asked for, each once; auto is one."""
    several = isinstance(num_clusters, Sequence) and not isinstance(num_clusters, str)
    return list(dict.fromkeys(num_clusters)) if several else [num_clusters]


def choose_folder(folder: Path, numbers: list[Any], number: Any) -> Path:
    """Return the run folder for one of the numbers: that of the command for the first."""
    return folder if number == numbers[0] else folder / OTHER_NUMBERS / str(number)


def write_tabbed_report(folder: Path, numbers: list[Any], *, title: str) -> None:
    """Put the reports of all numbers into that of the first one, unless they are there already."""
    first = (folder / REPORT).read_text(encoding="utf-8")
    if len(numbers) < 2 or MARK in first[:2000]:
        return
    pages = {format_count(numbers[0], "cluster"): (first, "")}
    for number in numbers[1:]:
        page = (choose_folder(folder, numbers, number) / REPORT).read_text(encoding="utf-8")
        pages[format_count(number, "cluster")] = page, f"{OTHER_NUMBERS}/{number}/"
    write_text(folder / REPORT, join_reports(pages, title=title))
