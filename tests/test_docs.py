"""What docs/ tells a reader to write works as it stands there."""

import re
from pathlib import Path

from deepclust.commands.train import run
from tests.conftest import compose_train

TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
IMPORTS = (
    "from torch import nn\n"
    "from deepclust.engine import distributed\n"
    "from deepclust.methods.base import ClusteringMethod\n"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_smallest_method_trains(tmp_path, monkeypatch):
    (code,), (config,) = blocks("python"), blocks("yaml")
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg" / "entropy.py").write_text(IMPORTS + code)
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    (tmp_path / "my_conf" / "method" / "entropy.yaml").write_text(config)
    monkeypatch.syspath_prepend(tmp_path)
    searched = f"hydra.searchpath=[file://{tmp_path / 'my_conf'}]"
    cfg = compose_train("method=entropy", searched, "hardware=cpu", "trainer.max_epochs=2", "report.map_points=60")
    results = run(cfg, tmp_path)
    assert results["method"] == "entropy" and results["health"]["cluster_size_entropy"] > 0.5


def test_files_that_are_named_exist():
    for name in re.findall(r"`((?:conf|tests|deepclust)/[\w./]+\.\w+)`", TEXT):
        assert (Path(__file__).parents[1] / name).exists(), name
