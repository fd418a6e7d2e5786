"""Curves in the page: their points, limits and axes."""

from pathlib import Path

import numpy as np
import pytest

from tests.report.pages import make_results, write_metrics, write_page


def write_scalar(folder: Path, name: str, values: list[str]) -> Path:
    """Write a metrics.csv of one scalar."""
    file = folder / "metrics.csv"
    file.write_text(f"step,{name}\n" + "".join(f"{step},{value}\n" for step, value in enumerate(values)))
    return file


def test_curves_end_in_the_final_values(tmp_path: Path) -> None:
    page = write_page(tmp_path, metrics_file=write_metrics(tmp_path), results=make_results(steps=1000))
    assert page.tags.count("figure") == 3  # one for the scores of the method, one for k-means, one for the loss
    for part in ("ACC 90", "NMI 80", "ARI 70", "ACC 85", "train/loss", "epoch"):
        assert part in page.text
    longest = max(page.values("path", "d"), key=len)
    points = np.array([point.split() for point in longest[1:].split("L")], float)
    assert 200 < len(points) <= 300
    assert np.all(np.diff(points[:, 0]) >= 0) and np.all(np.diff(points[:, 1]) >= 0)  # y grows downwards
    assert np.isfinite(points).all()


@pytest.mark.parametrize(
    "values",
    [["0.5"], ["0", "0"], ["1e-9", "2e-9"], ["-3", "1e6"], ["nan", "inf"], [], ["1", f"{1 + 1e-15}"]],
)
def test_curves_of_any_values_can_be_drawn(tmp_path: Path, values: list[str]) -> None:
    page = write_page(tmp_path, metrics_file=write_scalar(tmp_path, "train/x", values))
    assert page.tags.count("svg") == bool(values and values[0] != "nan")
    for path in page.values("path", "d"):
        assert "nan" not in path and "inf" not in path


def test_a_curve_that_stays_at_0_has_nothing_below_it(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,eval/empty_clusters\n1,0\n2,0\n")  # no step 0, whose label would be a 0 too
    words = write_page(tmp_path, metrics_file=file).text.split()
    assert {"0", "0.5", "1"} <= set(words) and "-0.5" not in words


@pytest.mark.parametrize(("values", "ticks"), [(["1", "0.01", "0.00001"], {"1", "0.01"}), (["1", "0", "1e-9"], {"0"})])
def test_curves_over_many_decades_are_logarithmic(tmp_path: Path, values: list[str], ticks: set[str]) -> None:
    page = write_page(tmp_path, metrics_file=write_scalar(tmp_path, "train/x", values))
    assert ticks <= set(page.text.split())
    curve = [point.split() for point in page.values("path", "d")[-1][1:].split("L")]
    heights = np.array(curve, float)[:, 1]
    middle = (heights[1] - heights[0]) / (heights[2] - heights[0])
    assert middle == pytest.approx(0.4 if "0" not in values else 1, abs=0.01)  # 2 of 5 decades; linear with a 0


def test_an_estimated_number_of_clusters_has_a_curve_for_each_measure(tmp_path: Path) -> None:
    measures = ("communities", "fine communities", "separation")
    estimate = {
        "message": "10 clusters by the features alone",
        "curves": {measure: [(2, 0.1), (5, 0.4), (10, 0.9)] for measure in measures},
        "named": {"communities": 10, "fine communities": 5, "separation": 10},
    }
    page = write_page(tmp_path, results=make_results(number=estimate))
    assert page.tags.count("figure") == 3
    for part in ("Number of clusters", "10 clusters by the features alone", "suggests 10", "suggests 5"):
        assert part in page.text
