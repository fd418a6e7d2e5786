"""The summary that the terminal shows at the end of a run."""

from pathlib import Path

import pytest

from deepclust.runs.summary import print_summary


@pytest.mark.parametrize(
    ("earlier_seconds", "expected"),
    [(0.0, "trained 1.0 min, 500"), (300.0, "trained 6.0 min, 5.0 of them in earlier stages")],
)
def test_minutes_include_earlier_stages(capsys: pytest.CaptureFixture, earlier_seconds: float, expected: str) -> None:
    results = {
        "method": "lnscc",
        "dataset": "photos",
        "seed": 0,
        "steps": 100,
        "num_clusters": 10,
        "scores": {"method": None, "kmeans": None},
        "health": {"empty_clusters": 0, "cluster_size_entropy": 0.9},
        "timing": {"train_seconds": 60.0, "earlier_seconds": earlier_seconds, "images_per_second": 500.0},
    }
    print_summary(results, Path("run"))
    assert expected in " ".join(capsys.readouterr().out.split())
