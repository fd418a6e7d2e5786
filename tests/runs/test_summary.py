"""What the terminal says at the end of a run."""

from pathlib import Path

import pytest

from deepclust.runs.summary import print_summary


@pytest.mark.parametrize(
    ("earlier", "said"), [(0.0, "trained 1.0 min, 500"), (300.0, "trained 6.0 min, 5.0 of them before its last stage")]
)
def test_minutes_include_the_stages_before(capsys, earlier: float, said: str) -> None:
    results = {
        "method": "lnscc",
        "dataset": "photos",
        "seed": 0,
        "steps": 100,
        "num_clusters": 10,
        "scores": {"method": None, "kmeans": None},
        "health": {"empty_clusters": 0, "cluster_size_entropy": 0.9},
        "timing": {"train_seconds": 60.0, "earlier_seconds": earlier, "images_per_second": 500.0},
    }
    print_summary(results, Path("run"))
    assert said in " ".join(capsys.readouterr().out.split())
