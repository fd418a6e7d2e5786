"""What loggers leave behind."""

import csv

import pytest

from deepclust.loggers.metrics_csv import MetricsCsv


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_one_row_a_step_whenever_a_column_appears(tmp_path):
    logger = MetricsCsv(folder=tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_metrics({"a": 2.0}, 2)
    logger.log_metrics({"b": 3.0}, 2)
    logger.finalize("success")
    assert rows(tmp_path) == [{"step": "1", "a": "1.0", "b": ""}, {"step": "2", "a": "2.0", "b": "3.0"}]


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path):
    logger = MetricsCsv(folder=tmp_path)
    for step in (1, 2, 3, 4):
        logger.log_metrics({"a": float(step)}, step)
    logger.save()
    again = MetricsCsv(folder=tmp_path)
    again.log_metrics({"a": 30.0}, 3)
    again.save()
    assert [(r["step"], r["a"]) for r in rows(tmp_path)] == [("1", "1.0"), ("2", "2.0"), ("3", "30.0")]


def test_wandb_works_without_an_account(tmp_path, run_small, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    _, folder = run_small("logger=wandb", "trainer.max_epochs=1")
    runs = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 1 and runs[0].stat().st_size > 0
    identity = (folder / "wandb_id.txt").read_text()
    assert identity in runs[0].name
    assert rows(folder), "metrics.csv is written beside"


def test_tensorboard_reads_back(run_small):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, folder = run_small("logger=tensorboard", "trainer.max_epochs=1", "trainer.log_every_n_steps=1")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert {"train/loss", "eval/kmeans/acc"} <= set(events.Tags()["scalars"])
