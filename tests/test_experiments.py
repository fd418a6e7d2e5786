"""The headers of published experiments: beside every figure stands how the authors chose the epoch that it is from."""

import re
from pathlib import Path

import pytest

EXPERIMENTS = sorted((Path(__file__).parents[1] / "conf/experiment").glob("*.yaml"))
KINDS = ("the last", "the best by their selection loss", "the best by the ground truth", "not known")


def read_header(path: Path) -> str:
    lines = path.read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_figure_says_how_its_epoch_was_chosen(path):
    header = read_header(path)
    assert "Expected" in header and "Reproduced by us" in header
    if re.search(r"\b(ACC|NMI|ARI|AMI) (about )?\d", header.split("Expected")[1]):
        chosen = re.search(r"Their epoch: ([^.]+)\. ", header)
        assert chosen and chosen[1].startswith(KINDS), header


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_headers_expect_only_scores_that_a_run_reports(path):
    expected = read_header(path).split("Expected")[1]
    assert not re.search(r"(linear|k-NN) probe \d", expected)
