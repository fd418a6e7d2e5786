"""Cells of CSV files that a spreadsheet shows as text and never computes as a formula."""

from typing import Any

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def text_cell(value: Any) -> Any:
    """Return a cell with an apostrophe before text that a spreadsheet would take for a formula; numbers stay."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def path_cell(path: str) -> str:
    """Return a cell with a path that names the same file and that no spreadsheet takes for a formula: `./=1+1.png`."""
    return f"./{path}" if path.startswith(FORMULA_STARTS) else path
