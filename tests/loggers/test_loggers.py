"""The files and records that loggers write."""

import csv
import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from deepclust.errors import InputError
from deepclust.loggers import weights_and_biases
from deepclust.loggers.metrics_csv import MetricsCsv
from deepclust.runs.dashboards import send_to_dashboards
from deepclust.score_names import SCORE_NAMES
from tests.comparison.run_folders import compare, write_run


def read_metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_each_step_has_one_row_with_all_columns(tmp_path):
    logger = MetricsCsv(folder=tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_metrics({"a": 2.0}, 2)
    logger.log_metrics({"b": 3.0}, 2)
    logger.finalize("success")
    assert read_metrics(tmp_path) == [{"step": "1", "a": "1.0", "b": ""}, {"step": "2", "a": "2.0", "b": "3.0"}]


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path):
    logger = MetricsCsv(folder=tmp_path)
    for step in (1, 2, 3, 4):
        logger.log_metrics({"a": float(step)}, step)
    logger.save()
    resumed_logger = MetricsCsv(folder=tmp_path)
    resumed_logger.log_metrics({"a": 30.0}, 3)
    resumed_logger.save()
    assert [(r["step"], r["a"]) for r in read_metrics(tmp_path)] == [("1", "1.0"), ("2", "2.0"), ("3", "30.0")]


def test_wandb_works_without_an_account(tmp_path, train_small, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    results, folder = train_small("logger=wandb", "trainer.max_epochs=1")
    runs = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 1
    run_id = (folder / "wandb_id.txt").read_text()
    assert run_id in runs[0].name
    assert read_metrics(folder), "metrics.csv is written too"
    kinds, text = read_wandb_file(runs[0])
    assert {"run", "history", "summary", "exit"} <= kinds
    for part in ("final/kmeans/acc", "clusters/000", "contingency", "eval/cluster_size_entropy", '"propos"'):
        assert part in text, part
    assert f"{results['scores']['kmeans']['acc']}" in text
    assert len(list((folder / "wandb").rglob("clusters/*.png"))) == 10 - results["health"]["empty_clusters"]
    # The next run of a sweep is trained in the same process.
    _, next_folder = train_small("logger=wandb", "trainer.max_epochs=1", name="next")
    assert len(list((next_folder / "wandb").glob("offline-run-*/run-*.wandb"))) == 1


class NotFoundHandler(BaseHTTPRequestHandler):
    """Answers every request with 404."""

    def do_GET(self):
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def responding_server():
    with HTTPServer(("127.0.0.1", 0), NotFoundHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("server_responds", [False, True])
def test_wandb_goes_offline_where_it_cannot_go_online(
    server_responds, responding_server, tmp_path, monkeypatch, caplog
):
    pytest.importorskip("wandb").teardown()  # a process reads the environment once
    server = responding_server if server_responds else "http://127.0.0.1:9"
    monkeypatch.delenv("WANDB_MODE", raising=False)
    key = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    config = {"names": {"method": "propos", "backbone": "mlp"}, "dataset": {"name": "digits"}, "seed": 0}
    logger = weights_and_biases.wandb_logger(folder=tmp_path, config=config, project="test")
    logger.log_metrics({"eval/kmeans/acc": 0.5}, 1)
    logger.experiment.finish()
    assert ("could not go online" if server_responds else f"server {server} does not answer") in caplog.text
    assert bool([*(tmp_path / "wandb").glob("run-*")]) == server_responds  # else no connection was tried
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    kinds, text = read_wandb_file(file)
    assert {"run", "history"} <= kinds and "eval/kmeans/acc" in text
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(key.encode() in content for content in written) and key not in caplog.text


def test_a_server_without_response_is_not_waited_for(responding_server, monkeypatch):
    monkeypatch.setattr(weights_and_biases, "RESPONSE_TIMEOUT", 0.5)
    assert weights_and_biases.is_server_responding(responding_server)
    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        assert not weights_and_biases.is_server_responding(f"http://127.0.0.1:{silent_server.getsockname()[1]}")


def read_wandb_file(file):
    """Return the kinds of records in the file of an offline run, and the text of all records.

    Waits until the last record is there, since wandb writes the file in a process of its own.
    """
    deadline = time.monotonic() + 60
    kinds, text = parse_wandb_file(file)
    while "exit" not in kinds and time.monotonic() < deadline:
        time.sleep(0.5)
        kinds, text = parse_wandb_file(file)
    return kinds, text


def parse_wandb_file(file):
    """Return the kinds of the records that are in the file by now, and the text of all of them."""
    records = list_wandb_records(file)
    kinds = {record.WhichOneof("record_type") for record in records}
    return kinds, "\n".join(str(record).replace('\\"', '"') for record in records)


def list_wandb_records(file):
    """Parse a LevelDB log: 7 bytes of wandb's own, then blocks of 32 kB that hold pieces of records.

    Each piece begins with a checksum (4 bytes), its length (2), and whether it is a whole record or the first, a middle
    or the last piece of one (1).
    """
    from wandb.proto import wandb_internal_pb2

    data, position, records, pieces = file.read_bytes(), 7, [], b""
    while position + 7 < len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, piece_type = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if position + 7 + length > len(data):
            break  # The process of wandb is still writing this piece.
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if piece_type in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            records.append(record)
            pieces = b""
    return records


def test_tensorboard_files_hold_scores_and_images(train_small):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results, folder = train_small("logger=tensorboard", "trainer.max_epochs=1", "trainer.log_every_n_steps=1")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert {"train/loss", "eval/kmeans/acc", "final/kmeans/acc"} <= set(events.Tags()["scalars"])
    assert {"clusters/000", "contingency"} <= set(events.Tags()["images"])
    assert events.Scalars("final/kmeans/acc")[0].value == pytest.approx(results["scores"]["kmeans"]["acc"])


def test_a_wandb_run_is_finished_although_its_table_could_not_be_sent(monkeypatch, caplog):
    pytest.importorskip("wandb")
    calls = []

    class Run:
        summary: ClassVar = {}

        def log(self, values):
            if "contingency" in values:
                raise OSError("no network")
            calls.append("log")

        def finish(self):
            calls.append("finish")

    monkeypatch.setattr(WandbLogger, "experiment", Run())
    results = {"scores": {"kmeans": {"acc": 0.5}}, "health": {}}
    send_to_dashboards([WandbLogger()], results, [], np.ones((2, 2)), None)
    assert calls == ["log", "finish"] and Run.summary == {"final/kmeans/acc": 0.5} and "no network" in caplog.text


def test_a_dashboard_that_fails_does_not_end_the_run(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise OSError("no space left\nmore")

    monkeypatch.setattr(TensorBoardLogger, "experiment", property(broken))
    logger = TensorBoardLogger(save_dir="/nowhere")
    send_to_dashboards([logger], {"scores": {}, "health": {}, "steps": 1}, [], None, None)
    assert "no space left" in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"\xff\x00", b"two words", b"a" * 200])
def test_what_lies_in_place_of_the_id_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "wandb_id.txt"
    if content is None:
        os.mkfifo(file)  # reading it would wait for ever
    else:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"wandb_id\.txt is not as deepclust wrote it") as caught:
        weights_and_biases.read_run_id(file)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_table_of_a_sweep_on_wandb_is_that_of_compare(tmp_path, monkeypatch):
    """The summaries of offline runs, averaged over seeds, are the rows of `deepclust compare`."""
    pytest.importorskip("wandb").teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = ("train_seconds", "earlier_seconds")
    summaries = []
    for seed, acc, seconds in ((0, 0.8125, 61.0), (1, 0.9, 127.5)):
        folder = tmp_path / "sweep" / str(seed)
        scores = {"acc": acc, "nmi": acc - 0.1, "ari": acc / 3}
        write_run(
            folder,
            overrides=["method=cc", f"seed={seed}"],
            seed=seed,
            scores={"method": scores, "kmeans": {name: value / 2 for name, value in scores.items()}},
            baseline={"kmeans_on_pixels": {"acc": 0.3, "nmi": 0.2, "ari": 0.1}},
            timing=dict(zip(names, (seconds, 30.0), strict=True)),
        )
        results = json.loads((folder / "results.json").read_text()) | {"health": {"empty_clusters": seed}}
        config = {"names": {"method": "cc", "backbone": "mlp"}, "dataset": {"name": "digits"}, "seed": seed}
        logger = weights_and_biases.wandb_logger(folder=folder, config=config, project="test")
        send_to_dashboards([logger], results, [], None, None)
        summaries.append(read_wandb_summary(next((folder / "wandb").glob("offline-run-*/run-*.wandb"))))
    rows = {row.rule: row for row in compare(tmp_path).rows}
    for rule, key in (("method", "method"), ("k-means", "kmeans"), ("pixels", "kmeans_on_pixels")):
        for name in SCORE_NAMES:
            values = [summary[f"final/{key}/{name}"] for summary in summaries]
            assert np.mean(values) == pytest.approx(rows[rule].scores[name].mean, abs=1e-12)
            assert np.std(values, ddof=1) == pytest.approx(rows[rule].scores[name].spread, abs=1e-12)
    assert np.mean([s["final/minutes"] for s in summaries]) == pytest.approx(rows["method"].minutes, abs=1e-12)
    assert [summary["final/empty_clusters"] for summary in summaries] == [0, 1]


def read_wandb_summary(file):
    """Return the summary that the file of an offline run ends with, by name."""
    read_wandb_file(file)  # waits for its end
    summary = {}
    for record in list_wandb_records(file):
        for item in record.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return summary
