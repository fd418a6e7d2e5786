"""Progress of a training: scores in percent, and a line about what it costs before hours are spent."""

import logging
from types import SimpleNamespace

import pytest
import torch

from deepclust.callbacks import training_progress
from deepclust.callbacks.training_progress import TrainingProgress, format_status
from deepclust.runs.assemble import describe_shorter_ways
from tests.conftest import compose_train


def make_trainer(**changes):
    values = {"num_training_batches": 100, "max_epochs": 50, "current_epoch": 0, "is_global_zero": True}
    return SimpleNamespace(**values | {"callback_metrics": {}} | changes)


def run_batches(monkeypatch, seconds_a_batch: float, *, device: str = "cpu", num_batches: int = 20) -> TrainingProgress:
    """Tell the progress of batches that take so long, by a clock of the test."""
    clock = iter(seconds_a_batch * n for n in range(num_batches))
    monkeypatch.setattr(training_progress.time, "monotonic", lambda: next(clock))
    progress = TrainingProgress(line_every_seconds=30, shorter_ways="another way")
    for _ in range(num_batches):
        if not progress.is_cost_told:
            progress.tell_cost(make_trainer(), device)
    return progress


@pytest.mark.parametrize(
    ("seconds", "device", "is_told"), [(6.0, "cpu", True), (0.6, "cpu", False), (6.0, "cuda", False)]
)
def test_a_training_of_hours_on_a_cpu_is_told_once(seconds, device, is_told, monkeypatch, caplog):
    monkeypatch.setattr(training_progress.log, "disabled", False)  # as commands of other tests may have left it
    with caplog.at_level(logging.WARNING):
        run_batches(monkeypatch, seconds, device=device)
    texts = [record.getMessage() for record in caplog.records]
    expected = "an epoch takes about 10 min on this CPU, and all 50 take 8.3 h. Faster: another way"
    assert texts == ([expected] if is_told else [])


def test_scores_are_percent():
    metrics = {"train/loss": 1.5, "eval/method/acc": 0.977, "eval/cluster_size_entropy": 0.5, "other": 3.0}
    trainer = make_trainer(callback_metrics={name: torch.tensor(value) for name, value in metrics.items()})
    assert format_status(trainer) == "epoch 1/50  train loss 1.500  method acc 97.7 %  cluster_size_entropy 50.0 %"


def test_shorter_ways_can_be_typed():
    photos = ["dataset=folder", "dataset.path=my photos", "dataset.num_clusters=7"]
    text = describe_shorter_ways(compose_train(*photos))
    assert "backbone=conv_small dataset.image_size=32" in text
    assert "deepclust cluster images='my photos' num_clusters=7" in text
    assert describe_shorter_ways(compose_train("dataset=digits")) is None
