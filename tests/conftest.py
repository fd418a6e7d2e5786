"""Shared by all tests: composed configurations, and whole runs on real images."""

import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, open_dict

from tests.toy_verb import toy_verb  # noqa: F401  this makes the fixture known to all tests

hypothesis.settings.register_profile("same", derandomize=True)  # the same examples in every run
hypothesis.settings.register_profile("search", derandomize=False)  # new examples in every run
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# What is started in the background ignores Ctrl-C, and so do the processes that it starts; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

SMALL_RUN = [  # ProPos on the digits with a small network, about a second for an epoch
    "hardware=cpu",
    "trainer.max_epochs=2",
    "method.hidden_size=64",
    "method.embedding_size=32",
    "callbacks.checkpoint.min_seconds=0",
    "callbacks.evaluation.every_n_epochs=1",
    "report.map_points=60",
]


def compose_train(*overrides: str) -> DictConfig:
    """Return the configuration of `deepclust train OVERRIDES`."""
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    with open_dict(cfg):
        del cfg["hydra"]
    for group in cfg.names:
        cfg.names[group] = cfg.names[group] or choices[group]
    return cfg


@pytest.hookimpl(tryfirst=True)  # before tests are left out because they are slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make two of three cases of each test that is marked as `sampled` slow ones.

    The cases that stay quick are a diagonal: where cases repeat in threes, each kind is tried. It begins elsewhere for
    each test, so that the tests of a module try other methods. Of one or two cases the first stays quick.
    """
    cases_of_tests: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") is not None:
            cases_of_tests[item.nodeid.partition("[")[0]].append(item)
    for start, cases in enumerate(cases_of_tests.values()):
        for number, case in enumerate(cases):
            if (number + number // 3 + (start if len(cases) >= 3 else 0)) % 3:
                case.add_marker("slow")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many bad inputs tests/robustness has tried; a test that tries several says so (`record_property`)."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call" and report.nodeid.startswith("tests/robustness/")
    ]
    if reports:
        num_cases = sum(dict(report.user_properties).get("cases", 1) for report in reports)
        terminalreporter.write_line(f"tests/robustness: {num_cases} cases in {len(reports)} tests")


def compose_verb(verb: str, *overrides: str) -> DictConfig:
    """Return the configuration of `deepclust VERB OVERRIDES`."""
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        return compose(verb, overrides=list(overrides))


@pytest.fixture
def train_small(tmp_path: Path):
    """A function that trains with SMALL_RUN and more overrides in the folder `name`, and returns (results, folder)."""
    from deepclust.commands.train import run

    def train(*overrides: str, name: str = "run") -> tuple[dict[str, Any], Path]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return run(compose_train(*SMALL_RUN, *overrides), folder), folder

    return train
