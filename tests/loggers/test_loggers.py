"""What loggers leave behind."""

import csv
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from deepclust.loggers import weights_and_biases
from deepclust.loggers.metrics_csv import MetricsCsv
from deepclust.runs.dashboards import send_to_dashboards


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
    results, folder = run_small("logger=wandb", "trainer.max_epochs=1")
    runs = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 1
    identity = (folder / "wandb_id.txt").read_text()
    assert identity in runs[0].name
    assert rows(folder), "metrics.csv is written beside"
    kinds, said = read_wandb(runs[0])
    assert {"run", "history", "summary", "exit"} <= kinds
    for part in ("final/kmeans/acc", "clusters/000", "contingency", "eval/cluster_size_entropy", '"propos"'):
        assert part in said, part
    assert f"{results['scores']['kmeans']['acc']}" in said
    assert len(list((folder / "wandb").rglob("clusters/*.png"))) == 10 - results["health"]["empty_clusters"]
    _, other = run_small("logger=wandb", "trainer.max_epochs=1", name="next")  # as in a sweep, in the same process
    assert len(list((other / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


class Refusing(BaseHTTPRequestHandler):
    """A server that answers, and knows nothing."""

    def do_GET(self):
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def refusing():
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("somebody_answers", [False, True])
def test_wandb_goes_offline_where_it_cannot_go_online(somebody_answers, refusing, tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb").teardown()  # a process reads the environment once
    server = refusing if somebody_answers else "http://127.0.0.1:9"
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    config = {"names": {"method": "propos", "backbone": "mlp"}, "dataset": {"name": "digits"}, "seed": 0}
    logger = weights_and_biases.wandb_logger(folder=tmp_path, config=config, project="test")
    logger.log_metrics({"eval/kmeans/acc": 0.5}, 1)
    logger.experiment.finish()
    assert ("could not go online" if somebody_answers else f"server {server} does not answer") in caplog.text
    assert bool([*(tmp_path / "wandb").glob("run-*")]) == somebody_answers  # else it was not even tried
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    kinds, said = read_wandb(file)
    assert {"run", "history"} <= kinds and "eval/kmeans/acc" in said


def test_a_server_that_is_silent_is_not_waited_for(refusing, monkeypatch):
    monkeypatch.setattr(weights_and_biases, "ASK_TIMEOUT", 0.5)
    assert weights_and_biases.answers(refusing)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not weights_and_biases.answers(f"http://127.0.0.1:{silent.getsockname()[1]}")


def read_wandb(file):
    """The kinds of records in an offline run's file, and all that they say as one text.

    Waits for its end, as wandb's own process writes when it comes to it. The file is a LevelDB log: blocks of 32 kB
    that hold pieces of records, each with a checksum (4 bytes), its length (2) and whether it is whole, first, middle
    or last (1); the file begins with 7 bytes of its own.
    """
    patience = time.monotonic() + 60
    kinds, said = parse_wandb(file)
    while "exit" not in kinds and time.monotonic() < patience:
        time.sleep(0.5)
        kinds, said = parse_wandb(file)
    return kinds, said


def parse_wandb(file):
    from wandb.proto import wandb_internal_pb2

    data, place, kinds, texts, pieces = file.read_bytes(), 7, set(), [], b""
    while place + 7 < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        pieces += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            kinds.add(record.WhichOneof("record_type"))
            texts.append(str(record).replace('\\"', '"'))
            pieces = b""
    return kinds, "\n".join(texts)


def test_tensorboard_reads_back(run_small):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results, folder = run_small("logger=tensorboard", "trainer.max_epochs=1", "trainer.log_every_n_steps=1")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert {"train/loss", "eval/kmeans/acc", "final/kmeans/acc"} <= set(events.Tags()["scalars"])
    assert {"clusters/000", "contingency"} <= set(events.Tags()["images"])
    assert events.Scalars("final/kmeans/acc")[0].value == pytest.approx(results["scores"]["kmeans"]["acc"])


def test_a_run_on_the_service_is_closed_where_its_table_cannot_be_sent(monkeypatch, caplog):
    pytest.importorskip("wandb")
    said = []

    class Run:
        summary: ClassVar = {}

        def log(self, values):
            if "contingency" in values:
                raise OSError("no network")
            said.append("log")

        def finish(self):
            said.append("finish")

    monkeypatch.setattr(WandbLogger, "experiment", Run())
    results = {"scores": {"kmeans": {"acc": 0.5}}, "health": {}}
    send_to_dashboards([WandbLogger()], results, [], np.ones((2, 2)), None)
    assert said == ["log", "finish"] and Run.summary == {"final/kmeans/acc": 0.5} and "no network" in caplog.text


def test_a_dashboard_that_fails_does_not_end_the_run(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise OSError("no space left\nmore")

    monkeypatch.setattr(TensorBoardLogger, "experiment", property(broken))
    logger = TensorBoardLogger(save_dir="/nowhere")
    send_to_dashboards([logger], {"scores": {}, "health": {}, "steps": 1}, [], None, None)
    assert "no space left" in caplog.text
