"""A job of a sweep that ended without a result is told in one line."""

import pytest

from deepclust.cli.lost_jobs import explain_lost_job
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
