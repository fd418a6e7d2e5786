"""A comparison as an HTML page."""

from pathlib import Path

from deepclust.comparison.html_page import to_html
from tests.comparison.run_folders import PUBLISHED, compare


def test_page_links_to_reports(example_runs: Path) -> None:
    (example_runs / "outputs" / "1" / "report.html").touch()
    text = to_html(compare(example_runs, published=PUBLISHED), example_runs, page_folder=example_runs / "tables")
    assert 'href="../outputs/1/report.html"' in text and "outputs/0/report" not in text
    assert text.count('class="bars"') == 1 and "<script" not in text and "http" not in text
    assert "85.0 ± 5.0" in text and "out of memory" in text
