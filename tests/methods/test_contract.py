"""What every method of conf/method keeps, without special cases; on real digits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback
from omegaconf import OmegaConf

from deepclust.commands.train import find_earlier_run, run
from deepclust.config.build import build
from deepclust.engine.cuda_graphs import ReplayedParts
from deepclust.runs.assemble import build_datamodule
from deepclust.runs.checkpoint import load_checkpoint, load_method
from deepclust.runs.resolve import resolve_config
from deepclust.testing import check_assignments, check_losses
from tests.conftest import compose_train
from tests.engine.test_launch import TWO, deepclust
from tests.host_waits import HostWaits, watch_parts

METHODS = sorted(p.stem for p in (Path(__file__).parents[2] / "conf/method").glob("*.yaml"))
pytestmark = pytest.mark.parametrize("name", METHODS)


QUICK = ["report.map_points=60", "+trainer.limit_train_batches=4"]
WATCHED = ["callbacks.checkpoint.min_seconds=0", "callbacks.evaluation.every_n_epochs=1"]


def small(name: str, *overrides: str):
    """A run of two epochs, after few of the stages before it: enough of the last one to be sure of some images."""
    cfg = compose_train(f"method={name}", "hardware=cpu", "trainer.max_epochs=2", *QUICK, *overrides)
    stage, epochs = cfg, 10
    while (stage := stage.get("before")) is not None:
        stage.trainer.max_epochs, epochs = epochs, 2
        OmegaConf.update(stage, "trainer.limit_train_batches", 1.0, force_add=True)
    return cfg


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function: a run of two epochs of a method, made once; gives (results, folder)."""
    made: dict = {}

    def once(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = run(small(name, *WATCHED), folder), folder
        return made[name]

    return once


class Keep(Callback):
    """Does nothing but remember the method, whose state can then be read when the run has ended."""

    method = None

    def setup(self, trainer, pl_module, stage):
        Keep.method = pl_module


class Stand:
    """Stands in for the trainer where a loss is computed outside of training."""

    def __init__(self, method, datamodule):
        self.lightning_module, self.datamodule = method, datamodule
        self.accumulate_grad_batches, self.global_step, self.log_every_n_steps = 1, 0, 1
        self.current_epoch = 1000  # past every warm-up


def at_work(name: str, trained):
    """A method as it stands after its first E-step, and its datamodule."""
    cfg = small(name)
    if cfg.before is not None:
        cfg.start = str(trained(name)[1] / "before")
    images = build(cfg.dataset.source)
    cfg, _ = resolve_config(cfg, images, find_earlier_run(cfg, Path()))
    method, datamodule = build(cfg.method), build_datamodule(cfg, images)
    if cfg.earlier.run is not None:
        method.start_from(load_method(load_checkpoint(Path(cfg.earlier.run)))[1])
    method._trainer = datamodule.trainer = Stand(method, datamodule)
    method.on_train_start()
    method.e_step(method.encode_all(datamodule.clean_batches(images.fit), len(images.fit)), ("test",))
    return method, datamodule


def test_builds_and_every_parameter_gets_a_gradient(name, trained):
    method, datamodule = at_work(name, trained)
    batch = datamodule.on_after_batch_transfer(datamodule.read_batch(np.arange(64), epoch=0, number=0), 0)
    check_losses(method, batch)
    check_assignments(method, method.encode_all(datamodule.clean_batches(datamodule.fit), len(datamodule.fit)))
    twice = datamodule.on_after_batch_transfer(datamodule.read_batch(np.array([7, 7]), epoch=0, number=0), 0)
    check_losses(method, twice)
    gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in gradients.values()), "of one image, twice"


def test_crosses_two_e_steps_and_fills_the_run_folder(name, trained):
    results, folder = trained(name)
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


def test_callbacks_and_loggers_change_nothing_that_is_learned(name, trained, tmp_path):
    _, watched = trained(name)
    cfg = small(name, "callbacks=none", "logger=none", "+callbacks.keep._target_=tests.methods.test_contract.Keep")
    if cfg.before is not None:
        cfg.start = str(watched / "before")  # without callbacks it would leave no checkpoint to start from
    run(cfg, tmp_path)
    expected = state_of(watched)
    got = Keep.method.state_dict()
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


class Stop(Callback):
    """Ends a run as Ctrl-C would, in the middle of its second epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(name, trained, tmp_path):
    _, watched = trained(name)
    start = str(watched / "before") if (watched / "before").exists() else None
    stop = "+callbacks.stop._target_=tests.methods.test_contract.Stop"
    for more in ([stop], []):
        cfg = small(name, *WATCHED, "callbacks.checkpoint.every_n_steps=1", *more)
        cfg.start = start
        if more:
            with pytest.raises(KeyboardInterrupt):
                run(cfg, tmp_path)
            assert not (tmp_path / "results.json").exists()
        else:
            assert run(cfg, tmp_path)["scores"] == trained(name)[0]["scores"]
    for key, value in state_of(watched).items():
        assert torch.equal(state_of(tmp_path)[key], value), key


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(name, trained, tmp_path):
    """In float64 with batch statistics over all; the last of three batches divides in uneven shares."""
    _, watched = trained(name)
    start = [f"start={watched / 'before'}"] if (watched / "before").exists() else []
    told = [f"method={name}", *QUICK, *WATCHED, *start, "trainer.max_epochs=2"]
    told += ["hardware.precision=64-true", "sync_batchnorm=true", "batch_size=600", "drop_last=false"]
    deepclust("train", *told, "hardware=cpu", f"hydra.run.dir={tmp_path / 'one'}")
    deepclust("train", *told, *TWO, f"hydra.run.dir={tmp_path / 'two'}")
    for key, value in state_of(tmp_path / "one").items():
        told = state_of(tmp_path / "two")[key]
        torch.testing.assert_close(told, value, rtol=1e-6, atol=1e-9, msg=lambda m, n=key: f"{n}: {m}")
    one, two = (tmp_path / n / "assignments.csv" for n in ("one", "two"))
    assert one.read_text() == two.read_text()


def test_permuted_labels_change_nothing_that_is_learned(name, trained, tmp_path, monkeypatch):
    from deepclust.datasets import named_datasets

    honest_results, folder = trained(name)  # before there are other labels
    honest = named_datasets.load_embedded_digits

    def permuted(*args, **kwargs):
        images = honest(*args, **kwargs)
        images.labels[:] = np.random.default_rng(0).permutation(images.labels)
        return images

    monkeypatch.setattr(named_datasets, "load_embedded_digits", permuted)
    results = run(small(name, *WATCHED), tmp_path)
    expected = state_of(folder)
    for key, value in state_of(tmp_path).items():
        assert torch.equal(value, expected[key]), key
    assert results["scores"] != honest_results["scores"]


def test_checkpoint_loads_strictly_with_its_state(name, trained):
    _, folder = trained(name)
    _, method = load_method(load_checkpoint(folder))
    for key, value in method.state_dict().items():
        assert torch.equal(value, state_of(folder)[key]), key


WAITS = {"self_label": {"scan.py: return self.heads[int(self.best_head)](features)"}}  # chosen once, a buffer


def test_a_step_waits_for_no_device(name, trained):
    method, datamodule = at_work(name, trained)
    optimizer = method.configure_optimizers()["optimizer"]
    raw = datamodule.read_batch(np.arange(64), epoch=0, number=0)
    moved = [raw.images, raw.indices, raw.companions, raw.companion_images]
    with HostWaits([*method.parameters(), *method.buffers(), *moved]) as waits:
        batch = datamodule.on_after_batch_transfer(raw, 0)
        torch.stack(list(method.losses(batch).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert waits.found <= WAITS.get(name, set())


def test_parts_of_a_step_are_fit_for_a_gpu_graph(name, trained, monkeypatch):
    method, datamodule = at_work(name, trained)
    method.replayed_parts, found = ReplayedParts(), watch_parts(monkeypatch)
    for method.trainer.current_epoch in (1, 1000):  # in the midst of training, and past every warm-up
        batch = datamodule.on_after_batch_transfer(datamodule.read_batch(np.arange(64), epoch=0, number=0), 0)
        method.losses(batch)
    assert found or name in ("kmeans", "self_label")
    assert not set().union(*found.values()), found
