"""The contract that every method of conf/method fulfils, without special cases, on real digits."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback
from omegaconf import OmegaConf

from deepclust.commands.train import run
from deepclust.config.build import build
from deepclust.engine.cuda_graphs import ReplayedParts
from deepclust.runs.assemble import build_datamodule
from deepclust.runs.checkpoint import load_checkpoint, load_method
from deepclust.runs.earlier_stage import find_earlier_run
from deepclust.runs.resolve_config import resolve_config
from deepclust.testing import check_assignments, check_losses
from tests.conftest import compose_train
from tests.host_waits import HostWaits, watch_host_operations_in_parts
from tests.processes import TWO_PROCESSES, lock_shared_folder, run_deepclust

METHODS = sorted(p.stem for p in (Path(__file__).parents[2] / "conf/method").glob("*.yaml"))
# DEC with another weight, its relatives, and large networks
SLOW = ("idec", "decs", "self_evoc", "statdec", "generative_calibration")
pytestmark = [
    pytest.mark.sampled,
    pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in METHODS]
    ),
]

SMALL_RUN = [
    "report.map_points=60",
    "evaluation.kmeans_restarts=2",
    "pixel_baseline_max_values=0",
    "+trainer.limit_train_batches=4",
]
FREQUENT_CALLBACKS = ["callbacks.checkpoint.min_seconds=0", "callbacks.evaluation.every_n_epochs=1"]


def compose_small_run(name: str, *overrides: str):
    """Return the configuration of a run of two epochs.

    Stages before it have two, too. Where only images count of which the stage before is confident, that one has ten.
    """
    cfg = compose_train(f"method={name}", "hardware=cpu", "trainer.max_epochs=2", *SMALL_RUN, *overrides)
    stage, epochs = cfg, 10 if "threshold" in cfg.method else 2
    while (stage := stage.get("before")) is not None:
        stage.trainer.max_epochs, epochs = epochs, 2
        OmegaConf.update(stage, "trainer.limit_train_batches", 1.0, force_add=True)
    return cfg


def load_last_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return the state_dict of the last checkpoint of a run."""
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def read_logged_terms(folder: Path) -> list[dict[str, float]]:
    """Return the values below train/ of each step of a run."""
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return [{k: float(v) for k, v in row.items() if k.startswith("train/") and v} for row in rows]


@pytest.fixture(scope="module")
def train_once(tmp_path_factory):
    """Return a function that trains a method for two epochs, and gives (results, folder).

    Each method is trained once, by the first of the processes of pytest that needs it.
    """

    def train(name: str):
        with lock_shared_folder(tmp_path_factory, f"contract_{name}") as folder:
            if not (folder / "results.json").exists():
                run(compose_small_run(name, *FREQUENT_CALLBACKS), folder)
        return json.loads((folder / "results.json").read_text()), folder

    return train


class KeepMethod(Callback):
    """Keeps the method of a run, so that its state can be read when the run has ended; changes nothing."""

    method = None

    def setup(self, trainer, pl_module, stage):
        KeepMethod.method = pl_module


class TrainerStub:
    """Stands in for the trainer where a loss is computed outside of training."""

    def __init__(self, method, datamodule):
        self.lightning_module, self.datamodule = method, datamodule
        self.accumulate_grad_batches, self.global_step, self.log_every_n_steps = 1, 0, 1
        self.current_epoch = 1000  # past every warm-up


def build_after_e_step(name: str, train_once, *overrides: str, folder: Path | None = None):
    """Return a method in the state after its first E-step, and its datamodule.

    Stages before it are those of `train_once` or, where they have to follow the overrides, trained in `folder`.
    """
    cfg = compose_small_run(name, *overrides)
    if cfg.before is not None and folder is None:
        cfg.start = str(train_once(name)[1] / "before")
    images = build(cfg.dataset.source)
    cfg, _ = resolve_config(cfg, images, find_earlier_run(cfg, folder or Path(), run_stage=run))
    method, datamodule = build(cfg.method), build_datamodule(cfg, images)
    if cfg.earlier.run is not None:
        method.start_from(load_method(load_checkpoint(Path(cfg.earlier.run)))[1])
    method._trainer = datamodule.trainer = TrainerStub(method, datamodule)
    method.on_train_start()
    method.e_step(method.encode_all(datamodule.clean_batches(images.fit), len(images.fit)), ("test",))
    return method, datamodule


def test_builds_and_every_parameter_gets_a_gradient(name, train_once):
    method, datamodule = build_after_e_step(name, train_once)
    batch = datamodule.on_after_batch_transfer(datamodule.read_batch(np.arange(64), epoch=0, batch_number=0), 0)
    check_losses(method, batch)
    check_assignments(method, method.encode_all(datamodule.clean_batches(datamodule.fit), len(datamodule.fit)))
    one_image_twice = datamodule.on_after_batch_transfer(
        datamodule.read_batch(np.array([7, 7]), epoch=0, batch_number=0), 0
    )
    check_losses(method, one_image_twice)
    gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in gradients.values()), "of a batch of one image, twice"


def test_one_cluster_gives_finite_terms_and_gradients(name, train_once, tmp_path):
    method, datamodule = build_after_e_step(name, train_once, "dataset.num_clusters=1", folder=tmp_path)
    batch = datamodule.on_after_batch_transfer(datamodule.read_batch(np.arange(64), epoch=0, batch_number=0), 0)
    check_losses(method, batch)
    check_assignments(method, method.encode_all(datamodule.clean_batches(datamodule.fit), len(datamodule.fit)))
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_crosses_two_e_steps_and_fills_the_run_folder(name, train_once):
    results, folder = train_once(name)
    for file in ("results.json", "assignments.csv", "metrics.csv", "report.html", "checkpoints/last.ckpt"):
        assert (folder / file).stat().st_size > 0, file
    assert results["epochs"] == 2 and results["num_images"] == 1797
    lines = (folder / "assignments.csv").read_text().splitlines()
    assert lines[0] == "index,cluster,confidence,label" and len(lines) == 1798
    clusters, confidence = np.array([line.split(",")[1:3] for line in lines[1:]], float).T
    assert clusters.min() >= 0 and clusters.max() < 10
    assert confidence.min() >= 0 and confidence.max() <= 1
    for rule in ("method", "kmeans"):
        scores = results["scores"][rule]
        assert scores is None or all(-1 <= scores[s] <= 1 for s in ("acc", "nmi", "ari"))


def test_callbacks_and_loggers_change_nothing_that_is_learned(name, train_once, tmp_path):
    _, expected_folder = train_once(name)
    cfg = compose_small_run(
        name, "callbacks=none", "logger=none", "+callbacks.keep_method._target_=tests.methods.test_contract.KeepMethod"
    )
    if cfg.before is not None:
        cfg.start = str(expected_folder / "before")  # a stage without callbacks leaves no checkpoint
    run(cfg, tmp_path)
    expected = load_last_state(expected_folder)
    state = KeepMethod.method.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


class InterruptSecondEpoch(Callback):
    """Interrupts a run in the middle of its second epoch, as Ctrl-C does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise KeyboardInterrupt


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(name, train_once, tmp_path):
    _, expected_folder = train_once(name)
    start = str(expected_folder / "before") if (expected_folder / "before").exists() else None
    interrupt = "+callbacks.interrupt._target_=tests.methods.test_contract.InterruptSecondEpoch"
    for is_interrupted in (True, False):
        overrides = [interrupt] if is_interrupted else []
        cfg = compose_small_run(name, *FREQUENT_CALLBACKS, "callbacks.checkpoint.every_n_steps=1", *overrides)
        cfg.start = start
        if is_interrupted:
            with pytest.raises(KeyboardInterrupt):
                run(cfg, tmp_path)
            assert not (tmp_path / "results.json").exists()
        else:
            assert run(cfg, tmp_path)["scores"] == train_once(name)[0]["scores"]
    for key, value in load_last_state(expected_folder).items():
        assert torch.equal(load_last_state(tmp_path)[key], value), key


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(name, train_once, tmp_path):
    """In float64, with batch statistics over all processes; the last of three batches splits into uneven parts."""
    _, expected_folder = train_once(name)
    start = [f"start={expected_folder / 'before'}"] if (expected_folder / "before").exists() else []
    overrides = [f"method={name}", *SMALL_RUN, *FREQUENT_CALLBACKS, *start, "trainer.max_epochs=2"]
    overrides += ["hardware.precision=64-true", "sync_batchnorm=true", "batch_size=600", "drop_last=false"]
    overrides += ["trainer.log_every_n_steps=1"]
    run_deepclust("train", *overrides, "hardware=cpu", f"hydra.run.dir={tmp_path / 'one'}")
    run_deepclust("train", *overrides, *TWO_PROCESSES, f"hydra.run.dir={tmp_path / 'two'}")
    for key, value in load_last_state(tmp_path / "one").items():
        value_of_two = load_last_state(tmp_path / "two")[key]
        torch.testing.assert_close(value_of_two, value, rtol=1e-6, atol=1e-9, msg=lambda m, n=key: f"{n}: {m}")
    one, two = (tmp_path / n / "assignments.csv" for n in ("one", "two"))
    assert one.read_text() == two.read_text()
    logged_by_one, logged_by_two = (read_logged_terms(tmp_path / n) for n in ("one", "two"))
    assert len(logged_by_one) == 6 and "train/loss" in logged_by_one[0]
    for values_of_one, values_of_two in zip(logged_by_one, logged_by_two, strict=True):
        assert values_of_two == pytest.approx(values_of_one, rel=1e-5, abs=1e-9)


def test_permuted_labels_change_nothing_that_is_learned(name, train_once, tmp_path, monkeypatch):
    from deepclust.datasets import named_datasets

    expected_results, folder = train_once(name)  # has to run before the labels are permuted
    load_embedded_digits = named_datasets.load_embedded_digits

    def load_with_permuted_labels(*args, **kwargs):
        images = load_embedded_digits(*args, **kwargs)
        images.labels[:] = np.random.default_rng(0).permutation(images.labels)
        return images

    monkeypatch.setattr(named_datasets, "load_embedded_digits", load_with_permuted_labels)
    cfg = compose_small_run(name, *FREQUENT_CALLBACKS)
    if cfg.before is not None:
        cfg.start = str(folder / "before")  # a method of its own, which has its own case
    results = run(cfg, tmp_path)
    expected = load_last_state(folder)
    for key, value in load_last_state(tmp_path).items():
        assert torch.equal(value, expected[key]), key
    assert results["scores"] != expected_results["scores"]


def test_checkpoint_loads_strictly_with_its_state(name, train_once):
    _, folder = train_once(name)
    _, method = load_method(load_checkpoint(folder))
    for key, value in method.state_dict().items():
        assert torch.equal(value, load_last_state(folder)[key]), key


EXPECTED_WAITS = {"self_label": {"scan.py: return self.heads[int(self.best_head)](features)"}}  # a buffer


def test_a_step_waits_for_no_device(name, train_once):
    method, datamodule = build_after_e_step(name, train_once)
    optimizer = method.configure_optimizers()["optimizer"]
    raw = datamodule.read_batch(np.arange(64), epoch=0, batch_number=0)
    on_device = [raw.images, raw.indices, raw.companions, raw.companion_images]
    with HostWaits([*method.parameters(), *method.buffers(), *on_device]) as waits:
        batch = datamodule.on_after_batch_transfer(raw, 0)
        torch.stack(list(method.losses(batch).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert waits.lines <= EXPECTED_WAITS.get(name, set())


def test_parts_of_a_step_are_fit_for_a_gpu_graph(name, train_once, monkeypatch):
    method, datamodule = build_after_e_step(name, train_once)
    method.replayed_parts, found = ReplayedParts(), watch_host_operations_in_parts(monkeypatch)
    for method.trainer.current_epoch in (1, 1000):  # early in training, and past every warm-up
        batch = datamodule.on_after_batch_transfer(datamodule.read_batch(np.arange(64), epoch=0, batch_number=0), 0)
        method.losses(batch)
    assert found or name in ("kmeans", "scc", "self_label")
    assert not set().union(*found.values()), found
