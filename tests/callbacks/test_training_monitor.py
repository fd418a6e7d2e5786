"""What a training logs of its speed, memory and E-steps, and that it learns the same without."""

import csv
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from deepclust.callbacks.training_monitor import TrainingMonitor, share_of_changed
from deepclust.engine.memory_estimate import read_process_bytes
from deepclust.methods.base import ClusteringMethod


def test_clusters_that_only_change_their_numbers_have_not_changed():
    before = torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32)
    assert share_of_changed(before, torch.tensor([2, 2, 0, 0, 1, 1], dtype=torch.int32)) == 0
    assert share_of_changed(before, torch.tensor([2, 2, 0, 1, 1, 1], dtype=torch.int32)) == pytest.approx(1 / 6)
    assert share_of_changed(before, torch.tensor([4, 4, 4, 4, 4, 4], dtype=torch.int32)) == pytest.approx(4 / 6)
    assert share_of_changed(before, before + 5000) is None


def test_the_share_is_that_of_the_best_of_all_matchings():
    from itertools import permutations

    generator = np.random.default_rng(0)
    for _ in range(20):
        before, after = generator.integers(0, 4, (2, 12)).astype(np.int32)
        best = max(int((np.array(order)[before] == after).sum()) for order in permutations(range(4)))
        assert share_of_changed(torch.from_numpy(before), torch.from_numpy(after)) == pytest.approx(1 - best / 12)


class Method(ClusteringMethod):
    """Has E-steps whose clusters a test sets."""

    clusters: torch.Tensor | None = None

    def e_step_assignments(self):
        return self.clusters


@pytest.fixture
def method():
    method = Method(
        backbone=nn.Linear(3, 2), num_clusters=2, optimizer=torch.optim.SGD, schedule=None, e_step_every_n_epochs=1
    )
    method.logged = []
    return method


class KeptValues:
    """A logger that keeps what it is given, in `logged`."""

    def __init__(self, logged: list[dict[str, float]]) -> None:
        self.logged = logged

    def log_metrics(self, values, step):
        self.logged.append(dict(values))


def make_trainer(method, every: int, step: int = 0):
    groups = [SimpleNamespace(param_groups=[{"lr": 0.5}, {"lr": 0.25}])]
    datamodule = SimpleNamespace(seconds_waited=0.0)
    return SimpleNamespace(
        global_step=step,
        log_every_n_steps=every,
        is_global_zero=True,
        optimizers=groups,
        datamodule=datamodule,
        loggers=[KeptValues(method.logged)],
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0)),
    )


BATCH = SimpleNamespace(draws=SimpleNamespace(global_batch_size=64))


def train_batches(monitor, trainer, method, count: int, accumulated: int = 1) -> None:
    for number in range(count):
        monitor.on_train_batch_start(trainer, method, BATCH, number)
        if (number + 1) % accumulated == 0:
            monitor.on_before_optimizer_step(trainer, method, None)
            trainer.global_step += 1
        trainer.datamodule.seconds_waited += 0.5
        monitor.on_train_batch_end(trainer, method, None, BATCH, number)


def test_values_come_at_the_logging_interval(method):
    monitor, trainer = TrainingMonitor(gradient_norm=False), make_trainer(method, every=3)
    monitor.on_train_start(trainer, method)
    train_batches(monitor, trainer, method, 8)
    assert len(method.logged) == 2
    names = {"learning_rate/0", "learning_rate/1", "speed/images_per_second", "speed/data_seconds"}
    assert set(method.logged[0]) - {"memory/process_bytes"} == names
    assert method.logged[1]["learning_rate/1"] == 0.25 and method.logged[1]["speed/data_seconds"] == 0.5


def test_accumulated_batches_count_and_a_step_is_logged_once(method):
    monitor, trainer = TrainingMonitor(gradient_norm=False), make_trainer(method, every=1)
    monitor.on_train_start(trainer, method)
    train_batches(monitor, trainer, method, 6, accumulated=3)
    assert len(method.logged) == 2


def test_time_between_epochs_does_not_count(method):
    monitor, trainer = TrainingMonitor(gradient_norm=False), make_trainer(method, every=2)
    monitor.on_train_start(trainer, method)
    train_batches(monitor, trainer, method, 1)
    monitor.on_train_epoch_end(trainer, method)
    time.sleep(0.3)
    train_batches(monitor, trainer, method, 1)
    assert method.logged[0]["speed/images_per_second"] > 128 / 0.25


def test_e_steps_are_told_once_with_what_they_have_changed(method):
    monitor, trainer = TrainingMonitor(gradient_norm=False), make_trainer(method, every=1)
    monitor.on_train_start(trainer, method)
    method.clusters, method.e_step_seconds = torch.tensor([0, 0, 1, 1]), 2.0
    train_batches(monitor, trainer, method, 2)
    assert method.logged[0]["speed/e_step_seconds"] == 2 and "e_step/changed" not in method.logged[0]
    assert "speed/e_step_seconds" not in method.logged[1]
    method.clusters, method.e_step_seconds = torch.tensor([1, 0, 0, 0]), 5.0
    train_batches(monitor, trainer, method, 1)
    assert method.logged[2]["speed/e_step_seconds"] == 3 and method.logged[2]["e_step/changed"] == 0.25


def test_a_run_that_goes_on_knows_the_clusters_of_its_last_e_step(method):
    method.clusters, method.e_step_seconds = torch.tensor([0, 0, 1, 1]), 7.0
    monitor, trainer = TrainingMonitor(gradient_norm=False), make_trainer(method, every=1, step=10)
    monitor.on_train_start(trainer, method)
    method.clusters.copy_(torch.tensor([0, 1, 1, 1]))
    method.e_step_seconds = 8.0
    train_batches(monitor, trainer, method, 1)
    assert method.logged[0]["speed/e_step_seconds"] == 1 and method.logged[0]["e_step/changed"] == 0.25


def test_the_norm_is_that_of_all_gradients(method):
    monitor, trainer = TrainingMonitor(gradient_norm=True), make_trainer(method, every=1)
    monitor.on_train_start(trainer, method)
    method.backbone(torch.ones(4, 3)).sum().backward()
    train_batches(monitor, trainer, method, 1)
    expected = torch.cat([p.grad.flatten() for p in method.parameters()]).norm()
    assert method.logged[0]["gradients/norm"] == pytest.approx(float(expected))


def test_the_memory_of_the_process_is_measured():
    before = read_process_bytes()
    if before is None:
        pytest.skip("this system does not say")
    block = torch.ones(2**24)
    assert read_process_bytes() - before > 2**25
    del block


@pytest.mark.slow
def test_a_run_logs_everything_and_learns_the_same_without(train_small):
    arguments = ["trainer.log_every_n_steps=2", "trainer.max_epochs=3", "callbacks.evaluation.every_n_epochs=3"]
    _, folder = train_small(*arguments, "callbacks.monitor.gradient_norm=true")
    _, without = train_small(*arguments, "~callbacks.monitor", name="without")
    one, two = (torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (folder, without))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert (folder / "assignments.csv").read_text() == (without / "assignments.csv").read_text()
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 10  # 21 steps
    names = ["learning_rate/0", "speed/images_per_second", "speed/data_seconds", "memory/process_bytes"]
    assert all(float(row[name]) >= 0 for row in rows for name in [*names, "gradients/norm"])
    changed = [row["e_step/changed"] for row in rows if row["e_step/changed"]]
    assert len(changed) == 2 and all(0 <= float(value) <= 1 for value in changed)
    assert sum(bool(row["speed/e_step_seconds"]) for row in rows) == 3
    text = (without / "metrics.csv").read_text().splitlines()[0]
    assert "speed/" not in text and "learning_rate" not in text
    page = (folder / "report.html").read_text()
    assert "data seconds" not in page and "process bytes" not in page
