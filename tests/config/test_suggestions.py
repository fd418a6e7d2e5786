"""The suggestion of a known name for one that was mistyped."""

import re
import sys

import pytest
from omegaconf import OmegaConf

from deepclust.cli.main import main
from deepclust.config.suggestions import find_nearest_name
from tests.conftest import compose_train


def test_nearest_name_prefers_a_key_that_ends_in_the_word():
    known = ["trainer.max_epochs", "method.schedule.epochs", "seed", "method.epochs"]
    assert find_nearest_name("trainer.max_epoch", known) == "trainer.max_epochs"
    assert find_nearest_name("epochs", known) == "method.epochs"
    assert find_nearest_name("zebra", known) is None


def test_nearest_name_of_a_key_that_lacks_a_part_or_has_another_last_part():
    known = ["method.optimizer.lr", "method.optimizer.momentum", "hydra.launcher.verbose", "seed"]
    assert find_nearest_name("method.lr", known) == "method.optimizer.lr"
    assert find_nearest_name("hydra.launcher.n_jobs", known) is None


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("num_clusters=3", "dataset.num_clusters=3"),
        ("method.lr=3", "method.optimizer.lr=3"),
        ("lr=3", "method.optimizer.lr=3"),
        ("precision=bf16-mixed", "hardware.precision=bf16-mixed"),
        ("devices=2", "hardware.devices=2"),
        ("image_size=16", "dataset.image_size=16"),
        ("epochs=3", None),
        ("max_epochs=3", "trainer.max_epochs=3"),
        ("hydra.launcher.n_jobs=2", None),
        ("method.num_cluster=3", None),
        ("widths=[8]", "backbone.widths=[8]"),
        ("evaluation.restarts=3", None),
        ("~callbacks.evaluatio", "~callbacks.evaluation"),
    ],
)
def test_advice_works_when_followed_and_names_where_the_value_is_defined(override, advice, monkeypatch, capfd):
    arguments = ["deepclust", "train", "--cfg", "job", "dataset=digits"]
    monkeypatch.setattr(sys, "argv", [*arguments, override])
    assert main() == 2
    message = capfd.readouterr().err
    written = re.search(r"; write (\S+)$", message.strip())
    assert advice is None or (written is not None and written[1] == advice), message
    if written:
        monkeypatch.setattr(sys, "argv", [*arguments, written[1]])
        assert main() == 0
        key = written[1].lstrip("~").partition("=")[0]
        before = OmegaConf.select(compose_train("dataset=digits"), key)
        assert override.startswith("~") or not OmegaConf.is_dict(before), "a section would be replaced by a value"
