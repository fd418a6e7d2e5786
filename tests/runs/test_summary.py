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


def test_scores_are_percent_in_80_columns(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    scores = {"acc": 0.977, "nmi": 0.95, "ari": 1.0}
    results = {
        "method": "lnscc",
        "dataset": "photos",
        "seed": 0,
        "steps": 100,
        "num_clusters": 10,
        "scores": {"method": scores, "kmeans": scores},
        "health": {"empty_clusters": 0, "cluster_size_entropy": 0.9},
        "timing": {"train_seconds": 60.0, "images_per_second": 500.0},
    }
    print_summary(results, Path("run"))
    out = capsys.readouterr().out
    assert "97.7" in out and "100.0" in out and "0.977" not in out and "evenness 90.0 %" in out
    assert max(map(len, out.splitlines())) <= 80
