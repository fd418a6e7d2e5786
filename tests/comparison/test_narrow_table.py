"""The table of a comparison fits a terminal of 80 columns."""

import io

from rich.console import Console

from deepclust.comparison.formats import print_comparison
from deepclust.comparison.table import compare_runs
from tests.comparison.run_folders import write_run


def print_in(folder, width: int) -> str:
    file = io.StringIO()
    print_comparison(compare_runs(folder, published=[], ignore=["seed"]), Console(file=file, width=width))
    return file.getvalue()


def test_what_all_rows_share_moves_above_a_table_that_is_too_wide(tmp_path):
    scores = {rule: {"acc": 0.9123, "nmi": 0.8, "ari": 0.7} for rule in ("method", "kmeans")}
    for number, method in enumerate(("propos", "cc", "scan")):
        for seed in range(3):
            folder = tmp_path / f"{number}-{seed}"
            write_run(folder, overrides=[f"seed={seed}"], method=method, seed=seed, scores=scores)
    narrow, wide = print_in(tmp_path, 80), print_in(tmp_path, 200)
    assert max(map(len, narrow.splitlines())) <= 80
    assert narrow.startswith("all rows: Data set digits, Backbone conv_small, K 10, Epochs 5, Seeds 3\n")
    assert "91.2 ± 0.0" in narrow.replace("*", "") and "all rows" not in wide
