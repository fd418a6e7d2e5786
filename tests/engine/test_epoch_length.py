"""Runs that arguments of the trainer cut short: schedules, images and figures are those of what is really done."""

import json

import pytest
import torch
from lightning import Callback

from deepclust.cli import main as cli
from deepclust.commands.train import run
from deepclust.errors import InputError
from tests.conftest import SMALL_RUN, compose_train

pytestmark = pytest.mark.sampled

WATCH = "+callbacks.watch._target_=tests.engine.test_epoch_length.WatchSteps"
QUICK = ["pixel_baseline_max_values=0", "evaluation.kmeans_restarts=1", "callbacks.evaluation.every_n_epochs=9"]


class WatchSteps(Callback):
    """Keeps the learning rate of each optimiser step and the images of each batch."""

    def setup(self, trainer, pl_module, stage):
        WatchSteps.rates, WatchSteps.images = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.images.append(batch.indices.tolist())


@pytest.fixture
def train(train_small, monkeypatch):
    """Return a function that trains ProPos and gives results, the decays of the target, rates and images."""
    from deepclust.methods import propos

    def train(*overrides, **name):
        decays, compute = [], propos.compute_ema_decay

        def record(step, num_steps, **ends):
            decays.append((step, num_steps))
            return compute(step, num_steps, **ends)

        with monkeypatch.context() as patch:
            patch.setattr(propos, "compute_ema_decay", record)
            schedule = ["warmup_epochs=0", "schedule.warmup_epochs=0", "schedule.variant=fractional"]
            schedule = [f"method.{key}" for key in schedule]
            results, _ = train_small(*QUICK, *schedule, WATCH, *overrides, **name)
        return results, decays, WatchSteps.rates, WatchSteps.images

    return train


@pytest.mark.parametrize(
    ("overrides", "num_steps"),
    [
        (["+trainer.limit_train_batches=2"], 4),
        (["+trainer.limit_train_batches=0.5"], 6),
        (["+trainer.limit_train_batches=3", "+trainer.accumulate_grad_batches=2"], 4),
        (["+trainer.overfit_batches=2"], 4),
        (["+trainer.max_steps=3"], 3),
        (["+trainer.max_steps=10"], 10),
        (["+trainer.max_steps=3", "trainer.max_epochs=20", "+trainer.limit_train_batches=2"], 3),
        (["+trainer.max_steps=100", "trainer.max_epochs=1"], 7),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_schedule_and_target_end_with_the_last_step(overrides, num_steps, train):
    results, decays, rates, _ = train(*overrides)
    assert results["steps"] == num_steps == len(rates)
    assert decays[-1] == (num_steps, pytest.approx(num_steps)), "the decay of the target has reached its end"
    assert rates[-1] == min(rates) == pytest.approx(0, abs=1e-12), "the learning rate has gone down to its end"


def test_overfit_batches_are_the_same_images_in_every_epoch(train):
    _, _, _, images = train("+trainer.overfit_batches=2", "method.balanced_sampling=true")
    assert len(images) == 4 and images[:2] == images[2:] and set(images[0]).isdisjoint(images[1])
    _, _, _, images = train("+trainer.limit_train_batches=2", name="limited")
    assert len(images) == 4 and images[:2] != images[2:]


def test_images_per_second_count_the_images_of_every_batch(train):
    results, _, _, images = train("+trainer.accumulate_grad_batches=3", "trainer.max_epochs=1")
    rate = 256 * len(images) / results["timing"]["train_seconds"]
    assert results["steps"] == 3 and results["timing"]["images_per_second"] == pytest.approx(rate)


def test_a_run_of_max_steps_started_again_is_only_shown(tmp_path, monkeypatch, capfd):
    overrides = [*SMALL_RUN, *QUICK, "+trainer.max_steps=2", f"hydra.run.dir={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["deepclust", "train", *overrides])
    assert cli.main() == 0
    written = (tmp_path / "results.json").stat().st_mtime_ns
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 2
    assert cli.main() == 0, capfd.readouterr().err
    assert (tmp_path / "results.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("+trainer.fast_dev_run=true", r"fast_dev_run is True.*trainer\.max_epochs=1 \+trainer\.limit_train_batches=1"),
        ("+trainer.fast_dev_run=3", "fast_dev_run is 3"),
        ("+trainer.limit_train_batches=0", "less than one of the 7 batches.*limit_train_batches=1"),
        ("+trainer.limit_train_batches=0.1", "less than one of the 7 batches"),
    ],
)
def test_what_would_leave_no_run_is_refused(override, text, tmp_path):
    with pytest.raises(InputError, match=text):
        run(compose_train(*SMALL_RUN, *QUICK, override), tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_the_advice_in_place_of_a_trial_run_works(train_small):
    results, _ = train_small(*QUICK, "trainer.max_epochs=1", "+trainer.limit_train_batches=1")
    assert results["steps"] == 1 and torch.isfinite(torch.tensor(results["timing"]["images_per_second"]))
