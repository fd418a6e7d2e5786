"""`deepclust compare`: many runs -> one table of means and spreads over seeds, beside published figures.

Runs are grouped by what was run: data set, method, backbone, number of clusters, epochs, and every other
override that is not ignored. A run inside of another's folder, such as the stage before it, is part of that one.
The spread is the sample standard deviation over seeds.
"""

import sys
from importlib import resources
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from deepclust.comparison.formats import FILE_WIDTH, show, to_csv, to_latex, to_markdown, to_text
from deepclust.comparison.html_page import to_html
from deepclust.comparison.table import compare
from deepclust.errors import InputError

ENDINGS = {".txt": "text", ".md": "markdown", ".csv": "csv", ".tex": "latex", ".html": "html"}


def published_figures() -> list[dict]:
    """The entries of conf/published.yaml."""
    text = resources.files("deepclust.conf").joinpath("published.yaml").read_text(encoding="utf-8")
    figures = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(figures, dict)
    return figures["published"]


def main(cfg: DictConfig) -> None:
    """Print the table that the configuration asks for, or write it to a file."""
    output = None if cfg.output is None else Path(cfg.output)
    form = str((cfg.format or "text") if output is None else ENDINGS.get(output.suffix))
    if form not in ENDINGS.values():
        raise InputError(
            f"format={cfg.format}" if output is None else f"output={output} ends in {output.suffix!r}",
            expected=" or ".join(ENDINGS.values() if output is None else ENDINGS),
            do="choose one of these",
        )
    if cfg.format not in (None, form):
        raise InputError(
            f"format={cfg.format} and output={output} disagree",
            expected=f"{form}, which files ending in {output.suffix if output else ''} hold",
            do="leave format out, or choose another ending",
        )
    runs = Path(cfg.runs)
    comparison = compare(runs, published=published_figures(), ignore=list(cfg.ignore))
    if not comparison.rows:
        (name, why), *others = comparison.left_out
        more = f", and {len(others)} more" if others else ""
        raise InputError(
            f"runs={runs} holds no run for the table: {name} ({why}){more}",
            expected="a finished run",
            do="finish one by starting its command again in the same folder, or name another folder",
        )
    if form == "csv":  # has no place for notes
        for name, why in comparison.left_out:
            print(f"not in the table: {name} ({why})", file=sys.stderr)
    if output is None and form == "text":
        show(comparison, Console(width=None if sys.stdout.isatty() else FILE_WIDTH))
        return
    written = {"text": to_text, "markdown": to_markdown, "csv": to_csv, "latex": to_latex}
    if form == "html":
        text = to_html(comparison, runs, beside=Path() if output is None else output.parent)
    else:
        text = written[form](comparison)
    if output is None:
        print(text, end="")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        print(f"{output}: {len(comparison.rows)} rows, {len(comparison.left_out)} runs not in the table")
