"""What a training writes for those who watch it, and that a sweep shows it while it runs."""

import time
from types import SimpleNamespace

import torch

from deepclust.callbacks import run_status
from deepclust.callbacks.run_status import RunStatus
from deepclust.engine.run_status import read_status


def make_trainer(**changes):
    values = {"global_step": 10, "current_epoch": 2, "max_epochs": 8, "world_size": 2, "is_global_zero": True}
    values |= {"estimated_stepping_batches": 40, "callback_metrics": {}}
    return SimpleNamespace(**values | changes)


def test_epoch_score_speed_and_time_left(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_status.time, "monotonic", lambda: now[0])
    status, batch = RunStatus(folder=tmp_path), SimpleNamespace(indices=torch.arange(50))
    status.on_train_start(make_trainer(global_step=6), None)
    assert read_status(tmp_path)["epoch"] == 2 and read_status(tmp_path)["seconds_left"] is None
    now[0] += 4
    for _ in range(4):
        status.on_train_batch_end(make_trainer(), None, None, batch, 0)
    metrics = {"eval/cluster_size_entropy": torch.tensor(0.75), "eval/method/acc": torch.tensor(0.5)}
    status.on_train_epoch_end(make_trainer(callback_metrics=metrics), None)
    written = read_status(tmp_path)
    assert abs(written.pop("heartbeat") - time.time()) < 60
    assert written == {
        "epoch": 3,
        "epochs": 8,
        "images_per_second": 100.0,
        "seconds_left": 30.0,
        "score": 0.75,
        "score_name": "eval/cluster_size_entropy",
    }, "and no score that has seen labels"


def test_short_epochs_are_not_all_written_and_long_ones_more_than_once(tmp_path, monkeypatch):
    now, writes = [0.0], []
    monkeypatch.setattr(run_status.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_status, "update_status", lambda folder, **values: writes.append(now[0]))
    status, batch = RunStatus(folder=tmp_path), SimpleNamespace(indices=torch.arange(5))
    status.on_train_start(make_trainer(), None)
    for _ in range(24):
        now[0] += 0.25
        status.on_train_epoch_end(make_trainer(), None)
    assert writes == [0, 1, 2, 3, 4, 5, 6]
    for _ in range(40):
        now[0] += 1
        status.on_train_batch_end(make_trainer(), None, None, batch, 0)
    status.on_train_end(make_trainer(is_global_zero=False), None)
    assert writes[7:] == [21, 36], "process 0 alone writes"
