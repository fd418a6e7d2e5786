"""A verb with a small configuration of its own, for tests of the command line that train nothing."""

import logging
import sys
import types

import pytest

from deepclust.cli import main as command_line
from deepclust.cli.environment import FULL_ERROR


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A verb `toy` with a configuration of its own, run inside this process; returns `run(*arguments)`.

    `run.jobs` has the configuration of every job that started, `run.act` is what a job does with it.
    """
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
    monkeypatch.setitem(command_line.VERBS, "toy", "plays")
    monkeypatch.delenv(FULL_ERROR, raising=False)
    before = logging.root.handlers[:], logging.root.level

    def main(cfg):
        run.jobs.append(cfg)
        return run.act(cfg)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["deepclust", "toy", *arguments])
        return command_line.main()

    monkeypatch.setitem(sys.modules, "deepclust.commands.toy", types.SimpleNamespace(main=main))
    run.jobs, run.act, run.folder = [], lambda cfg: None, tmp_path
    yield run
    sys.modules.pop("toy_configs", None)
    logging.root.handlers[:], logging.root.level = before


def fail_at(seed: int, error: BaseException):
    def act(cfg):
        if cfg.seed == seed:
            raise error

    return act
