"""A comparison as an HTML page."""

from pathlib import Path

from deepclust.comparison.html_page import to_html
from tests.comparison.run_folders import PUBLISHED, compare, write_run


def test_page_links_to_reports(example_runs: Path) -> None:
    (example_runs / "outputs" / "1" / "report.html").touch()
    text = to_html(compare(example_runs, published=PUBLISHED), example_runs, page_folder=example_runs / "tables")
    assert 'href="../outputs/1/report.html"' in text and "outputs/0/report" not in text
    assert text.count('class="bars"') == 1 and "<script" not in text and "http" not in text
    assert "85.0 ± 5.0" in text and "out of memory" in text


def test_text_of_runs_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    write_run(tmp_path / "<img src=x>", dataset=evil, method=f'">{evil}')
    (tmp_path / "<img src=x>" / "report.html").touch()
    text = to_html(compare(tmp_path), tmp_path, page_folder=tmp_path)
    assert "&lt;script&gt;" in text and "<script" not in text and "<img" not in text
