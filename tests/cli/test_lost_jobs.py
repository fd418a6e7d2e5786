"""A job of a sweep that ended without a result is told in one line, and so is a launcher that fails."""

import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.errors import ConfigCompositionException
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from deepclust.cli.lost_jobs import explain_launcher_error, explain_lost_job
from deepclust.exit_codes import PROCESS_LOST, exit_code_of_error


class UncompletedJobError(RuntimeError):
    """As submitit's, which is an optional package."""


@pytest.fixture
def error(tmp_path):
    folder = tmp_path / ".submitit/7_1"
    folder.mkdir(parents=True)
    text = f"Job 7_1 (task: 1) with path {folder}/7_1_1_result.pkl\nhas not produced any output (state: FAILED)\nError:"
    return UncompletedJobError(text)


def test_srun_knows_which_task_ended_how(error, tmp_path):
    stream = "a warning\nsrun: error: n1: task 1: Killed\nTraceback (most recent call last):\n"
    (tmp_path / ".submitit/7_1/7_1_0_log.err").write_text(stream)
    explained = explain_lost_job(error)
    assert explained.what == "job 7_1 has ended without a result: task 1: Killed on n1"
    assert f"hydra.sweep.dir={tmp_path} goes on" in explained.do
    assert exit_code_of_error(explained) == PROCESS_LOST


def test_without_a_word_of_srun_the_state_of_slurm_is_told(error):
    assert explain_lost_job(error).what == "job 7_1 has ended without a result: task 1: FAILED"


def test_other_errors_are_not_explained(error):
    assert explain_lost_job(RuntimeError(str(error))) is None
    assert explain_lost_job(UncompletedJobError("Job not requeued because: timed-out too many times.")) is None


class OwnLauncher(Launcher):
    """One that fails by an error."""

    def setup(self, *, hydra_context, task_function, config):
        self.config = config

    def launch(self, error, initial_job_idx):
        raise error


def catch(launcher: Launcher, error: Exception) -> Exception:
    """Return the error that a launcher raises for a sweep in the folder /sweep."""
    config = OmegaConf.create({"hydra": {"sweep": {"dir": "/sweep"}}})
    launcher.setup(hydra_context=None, task_function=None, config=config)
    with pytest.raises(type(error)) as raised:
        launcher.launch(error, 0)
    return raised.value


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "sbatch"), ValueError("a\nb"), OSError(11, "x")]
)
def test_an_error_of_the_launcher_names_it(error):
    explained = explain_launcher_error(catch(OwnLauncher(), error))
    assert explained.what == f"OwnLauncher has failed: {type(error).__name__}: {' '.join(str(error).split())}"


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/sweep/0"), ConfigCompositionException("x")]
)
def test_errors_of_the_configuration_and_of_the_folder_are_not_the_launchers(error):
    assert explain_launcher_error(catch(OwnLauncher(), error)) is None
    assert explain_launcher_error(error) is None, "it came from elsewhere"


def test_the_plain_launcher_composes_and_makes_folders_only(monkeypatch):
    monkeypatch.setattr(BasicLauncher, "launch", OwnLauncher.launch)
    assert explain_launcher_error(catch(BasicLauncher(), ValueError("x"))) is None
