"""A report shown to whoever calls from Python: below the cell of a notebook, or in the browser."""

import html
import sys
import webbrowser
from pathlib import Path

from deepclust.errors import InputError


def show_report(report: Path) -> None:
    """Show an HTML file.

    Raises:
        InputError: if there is none.
    """
    if not report.is_file():
        raise InputError(f"{report} is missing", expected="the report of the run", do="bring it back, or train again")
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        webbrowser.open(report.absolute().as_uri())
        return
    from IPython.display import HTML, display

    # The text itself: a notebook shows no file of another folder.
    content = html.escape(report.read_text(encoding="utf-8", errors="replace"))
    frame = f'<iframe srcdoc="{content}" width="100%" height="700" style="border: 0"></iframe>'
    display(HTML(f"<div>{frame}</div>"))  # IPython warns of a frame that stands alone


def make_html_table(values: dict[str, str]) -> str:
    """Return a table of two columns, names and values, for a notebook."""
    rows = (
        f"<tr><th style='text-align: left'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"
