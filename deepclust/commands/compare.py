"""`deepclust compare`: many runs -> one table of means and spreads over seeds, with published figures.

Runs are grouped by what was run: data set, method, backbone, number of clusters, epochs, and every other override that
is not ignored. A run inside the folder of another run, such as an earlier stage, is part of that run. The spread is the
sample standard deviation over seeds.
"""

import sys
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from deepclust.comparison.formats import FILE_WIDTH, print_comparison, to_csv, to_latex, to_markdown, to_text
from deepclust.comparison.html_page import to_html
from deepclust.comparison.table import compare_runs
from deepclust.engine.output_files import check_output_file, is_standard_output, write_text
from deepclust.engine.plurals import format_count
from deepclust.errors import InputError

FORMAT_OF_SUFFIX = {".txt": "text", ".md": "markdown", ".csv": "csv", ".tex": "latex", ".html": "html"}


def read_published_figures() -> list[dict]:
    """Return the entries of conf/published.yaml."""
    text = resources.files("deepclust.conf").joinpath("published.yaml").read_text(encoding="utf-8")
    content = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(content, dict)
    return content["published"]


def print_table(runs: Path) -> None:
    """Print the table over the runs below a folder, as the command without further keys does.

    Raises:
        InputError: if there is no finished run.
    """
    text = resources.files("deepclust.conf").joinpath("compare.yaml").read_text(encoding="utf-8")
    defaults: Any = OmegaConf.to_container(OmegaConf.create(text))
    comparison = compare_runs(runs, published=read_published_figures(), ignore=defaults["ignore"])
    if comparison.rows:
        print_comparison(comparison, Console())


def main(cfg: DictConfig) -> None:
    """Print the table that the configuration asks for, or write it to a file."""
    output = None if cfg.output is None else Path(cfg.output)
    format_of_ending = None if output is None else FORMAT_OF_SUFFIX.get(output.suffix)
    if output is not None and cfg.format is None and format_of_ending is None:
        raise InputError(
            f"output={output} ends in {output.suffix!r}",
            expected=" or ".join(FORMAT_OF_SUFFIX),
            do="choose one of these, or name the format with format=NAME",
        )
    output_format = str(cfg.format or format_of_ending or "text")
    if output_format not in FORMAT_OF_SUFFIX.values():
        raise InputError(
            f"format={cfg.format}", expected=" or ".join(FORMAT_OF_SUFFIX.values()), do="choose one of these"
        )
    if format_of_ending not in (None, output_format):
        raise InputError(
            f"format={cfg.format} and output={output} disagree",
            expected=f"{format_of_ending}, the format of files with that ending",
            do="leave format out, or choose another ending",
        )
    if output is not None:
        check_output_file(output, key="output")
    runs = Path(cfg.runs)
    comparison = compare_runs(runs, published=read_published_figures(), ignore=list(cfg.ignore))
    if not comparison.rows:
        (name, reason), *others = comparison.left_out
        more = f", and {len(others)} more" if others else ""
        raise InputError(
            f"runs={runs} holds no run for the table: {name} ({reason}){more}",
            expected="a finished run",
            do="finish one by starting its command again in the same folder, or name another folder",
        )
    if output_format == "csv":  # which has no place for notes
        for name, reason in comparison.left_out:
            print(f"not in the table: {name} ({reason})", file=sys.stderr)
    if output is None and output_format == "text":
        print_comparison(comparison, Console(width=None if sys.stdout.isatty() else FILE_WIDTH))
        return
    formatters = {"text": to_text, "markdown": to_markdown, "csv": to_csv, "latex": to_latex}
    if output_format == "html":
        text = to_html(comparison, runs, page_folder=Path() if output is None else output.parent)
    else:
        text = formatters[output_format](comparison)
    if output is None:
        print(text, end="")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, text)
        rows, left_out = format_count(len(comparison.rows), "row"), format_count(len(comparison.left_out), "run")
        message = f"{output}: {rows}, {left_out} not in the table"
        print(message, file=sys.stderr if is_standard_output(output) else sys.stdout)
