"""A verb `toy` with a small configuration of its own, for tests of the command line that train nothing."""

import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepclust.cli import main as command_line
from deepclust.cli.environment import FULL_ERROR


class ToyVerb:
    """The verb `toy`. A test sets `on_job` to what a job does, calls `run`, and finds what ran in `job_configs`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder  # the working directory, with the run folder `run` and the sweep folder `sweep`
        self.monkeypatch = monkeypatch
        self.on_job: Callable[[Any], Any] = lambda cfg: None
        self.job_configs: list[Any] = []  # of every job that started

    def main(self, cfg: Any) -> Any:
        """What `deepclust.commands.toy` would do."""
        self.job_configs.append(cfg)
        return self.on_job(cfg)

    def run(self, *arguments: str) -> int:
        """Run `deepclust toy ARGUMENTS` inside this process and return the exit code."""
        self.monkeypatch.setattr(sys, "argv", ["deepclust", "toy", *arguments])
        return command_line.main()


@pytest.fixture
def toy_verb(tmp_path, monkeypatch):
    configs = tmp_path / "toy_configs"
    (configs / "method").mkdir(parents=True)
    (configs / "__init__.py").touch()
    (configs / "toy.yaml").write_text(
        "defaults: [_self_, method: propos, experiment: null]\n"
        "seed: 0\n"
        "trainer: {max_epochs: 3}\n"
        "hydra: {run: {dir: run}, sweep: {dir: sweep, subdir: '${hydra.job.num}'}}\n"
    )
    (configs / "experiment").mkdir()
    (configs / "experiment" / "paper.yaml").write_text("# @package _global_\nseed: 7\n")
    (configs / "method" / "propos.yaml").write_text("temperature: 0.5\n")
    (configs / "method" / "open.yaml").write_text("path: ???\n")
    (configs / "method" / "other.yaml").write_text("speed: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deepclust.config.composition.CONFIG_PACKAGE", "toy_configs")
    monkeypatch.setitem(command_line.VERBS, "toy", "for tests")
    monkeypatch.delenv(FULL_ERROR, raising=False)
    handlers, level = logging.root.handlers[:], logging.root.level

    verb = ToyVerb(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "deepclust.commands.toy", types.SimpleNamespace(main=verb.main))
    yield verb
    sys.modules.pop("toy_configs", None)
    logging.root.handlers[:], logging.root.level = handlers, level


def fail_at_seed(seed: int, error: BaseException) -> Callable[[Any], None]:
    """Return a job that raises `error` if its configuration has this seed."""

    def job(cfg):
        if cfg.seed == seed:
            raise error

    return job
