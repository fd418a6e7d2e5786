"""What the tests share: composed configurations and whole runs on real images."""

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from tests.toy_verb import toy  # noqa: F401  a fixture for all tests

hypothesis.settings.register_profile("same", derandomize=True)  # the same examples in every run
hypothesis.settings.register_profile("search", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

SMALL = [  # ProPos on digits in about a second an epoch
    "hardware=cpu",
    "trainer.max_epochs=2",
    "method.hidden_size=64",
    "method.embedding_size=32",
    "callbacks.checkpoint.min_seconds=0",
    "callbacks.evaluation.every_n_epochs=1",
    "report.map_points=60",
]


def compose_train(*overrides: str) -> DictConfig:
    """The configuration of `deepclust train OVERRIDES`."""
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
        choices = cfg.hydra.runtime.choices
        cfg = compose("train", overrides=list(overrides))
    for group in cfg.names:
        cfg.names[group] = cfg.names[group] or choices[group]
    return cfg


@pytest.fixture
def run_small(tmp_path: Path):
    """A function that trains with SMALL and more overrides in a folder of its own; gives (results, folder)."""
    from deepclust.commands.train import run

    def run_it(*overrides: str, name: str = "run") -> tuple[dict[str, Any], Path]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return run(compose_train(*SMALL, *overrides), folder), folder

    return run_it
