"""Limits of the trainer: which epochs are left of a run, and which limit is refused."""

import pytest

from deepclust.errors import InputError
from deepclust.runs.training_length import lower_max_epochs_to_max_steps, refuse_fast_dev_run
from tests.conftest import compose_train


@pytest.mark.parametrize(("max_steps", "epochs"), [(3, 2), (4, 2), (5, 3), (100, 6), (-1, 6)])
def test_epochs_end_with_the_steps_and_the_given_configuration_stays(max_steps, epochs):
    cfg = compose_train("trainer.max_epochs=6", f"+trainer.max_steps={max_steps}")
    assert lower_max_epochs_to_max_steps(cfg, batches_per_epoch=2).trainer.max_epochs == epochs
    assert cfg.trainer.max_epochs == 6


def test_a_trial_that_leaves_no_run_is_refused():
    with pytest.raises(InputError, match=r"fast_dev_run is 2.*; leave it out and write trainer\.max_epochs=1"):
        refuse_fast_dev_run(compose_train("+trainer.fast_dev_run=2"))
