"""Extra images help the representation only: what they do not train keeps its weights, in whatever optimiser."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule, Trainer
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.commands.train import run
from deepclust.config.build import build
from deepclust.datasets.image_sources import ArraySource
from deepclust.errors import InputError
from deepclust.methods.cc import CC
from deepclust.methods.gcc import GCC
from deepclust.nn.schedules import Constant
from deepclust.runs.assemble import build_datamodule
from deepclust.runs.resolve_config import resolve_config
from tests.conftest import compose_train
from tests.methods.test_contract import METHODS, TrainerStub

pytestmark = pytest.mark.sampled

NEED_AN_EARLIER_RUN = {"scan", "self_label", "generative_calibration"}
OPTIMIZER = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)  # both move weights whose gradient is 0
N, M, P = 8, 40, 3


@pytest.mark.parametrize("epoch", [0, 1000])
@pytest.mark.parametrize("name", sorted(set(METHODS) - NEED_AN_EARLIER_RUN))
def test_every_gradient_of_extra_images_is_none_or_not_zero(name, epoch):
    cfg = compose_train(f"method={name}", "dataset=digits", "hardware=cpu", "batch_size=64")
    images = build(cfg.dataset.source)
    cfg, _ = resolve_config(cfg, images, None)
    method, datamodule = build(cfg.method), build_datamodule(cfg, images)
    method._trainer = datamodule.trainer = TrainerStub(method, datamodule)
    method.trainer.current_epoch = epoch
    views = tuple(torch.rand(len(cfg.view_names), 32, *images.fit.read(np.arange(1)).shape[1:]))
    batch = TrainBatch(views, len(images.fit) + torch.arange(32), Draws((0,), 0, 32), extra=True)
    try:
        terms = method.losses(batch)
    except InputError as error:
        assert "extra" in str(error)
        return
    torch.stack(list(terms.values())).sum().backward()
    method.on_before_optimizer_step(None)
    idle = [n for n, p in method.named_parameters() if p.grad is not None and not p.grad.any()]
    assert not idle, f"momentum and weight decay would move {idle}"


def make_method(kind):
    backbone = nn.Linear(6, 6)
    backbone.num_features = 6
    torch.manual_seed(0)
    shared = {"backbone": backbone, "num_clusters": 4, "embedding_size": 5, "schedule": Constant()}
    if kind == "cc":
        return CC(**shared, instance_temperature=0.5, cluster_temperature=1.0, optimizer=OPTIMIZER)
    return GCC(
        **shared,
        num_images=M,
        bank_size=2,
        num_neighbors=5,
        num_positives=P,
        warmup_epochs=0,
        graph_every_n_epochs=100,
        temperature=0.5,
        representation_weight=1.0,
        balance_weight=1.0,
        optimizer=OPTIMIZER,
    )


class GivenLoader(torch.utils.data.Dataset):
    """The batches of an epoch; not a list, which Lightning takes for several loaders."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        return self.batches[number]


class GivenKinds(LightningDataModule):
    """One epoch of random batches: F, images that are clustered, and X, extra ones."""

    def __init__(self, kinds):
        super().__init__()
        self.kinds, self.fit, self.extra = kinds, range(M), None
        self.batches_per_epoch, self.batch_size = len(kinds), N

    def clean_batches(self, source, device):
        return [torch.randn(M, 6, generator=torch.Generator().manual_seed(1))]

    def train_dataloader(self):
        return GivenLoader([self.make_batch(number, kind == "X") for number, kind in enumerate(self.kinds)])

    def make_batch(self, number, is_extra):
        generator = torch.Generator().manual_seed(number)
        views = torch.randn(2 + P + 1, N, 6, generator=generator)
        companions = torch.randint(M, (N, P + 1), generator=generator)
        draws = Draws((0, 0, number), 0, N)
        indices = torch.arange(N) + (M if is_extra else 0)
        return TrainBatch(tuple(views[:2]), indices, draws, is_extra, tuple(views[2:]), companions)


class RecordMoves(Callback):
    """Notes for each batch whether it has moved the cluster head."""

    def __init__(self):
        self.moves, self.before = "", None

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.before = [p.detach().clone() for p in pl_module.cluster_head.parameters()]

    def on_train_batch_end(self, trainer, pl_module, *_):
        unchanged = all(map(torch.equal, self.before, pl_module.cluster_head.parameters()))
        self.moves += "-" if unchanged else "m"


@pytest.mark.parametrize("kind", ["cc", "gcc"])
@pytest.mark.parametrize(
    ("kinds", "accumulated", "moves"),
    [("XXFFXXF", 1, "--mm--m"), ("FXXFXXFF", 2, "-m-m---m"), ("FFXXX", 2, "-m---")],
)
def test_extra_images_leave_the_cluster_head_as_it_is(kind, kinds, accumulated, moves):
    recorder = RecordMoves()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=accumulated,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make_method(kind), GivenKinds(kinds))
    assert recorder.moves == moves


def test_a_fused_optimiser_takes_a_cluster_head_that_begins_later():
    method = make_method("cc")
    method.make_optimizer = partial(OPTIMIZER, fused=True)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(method, GivenKinds("XXFF"))
    assert trainer.global_step == 4


def test_methods_that_take_extra_images_are_the_known_ones():
    sources = {path.stem: path.read_text() for path in (Path(__file__).parents[2] / "deepclust/methods").glob("*.py")}
    take = {name for name, text in sources.items() if "batch.extra else" in text or "not batch.extra" in text}
    assert take == {"cc", "digpro", "drc", "gcc", "propos"}


class RecordEpochs(Callback):
    """Notes for each epoch the kinds of its batches, its optimiser steps and its learning rates."""

    def __init__(self):
        self.kinds, self.steps, self.rates = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.kinds.append("")
        self.rates.append(set())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.kinds[-1] += "X" if batch.extra else "F"
        self.rates[-1].add(round(trainer.optimizers[0].param_groups[0]["lr"], 12))

    def on_train_epoch_end(self, trainer, pl_module):
        self.steps.append(trainer.global_step)


def fit_digits(*overrides, num_extra, epochs, accumulated=1):
    cfg = compose_train(*overrides, "dataset=digits", "hardware=cpu", "batch_size=512", f"trainer.max_epochs={epochs}")
    images = build(cfg.dataset.source)
    if num_extra:
        pixels = np.random.default_rng(0).integers(0, 17, (num_extra, 8, 8, 1), np.uint8)
        images = replace(images, extra=ArraySource([pixels], 1))
    cfg, _ = resolve_config(cfg, images, None)
    method, datamodule, recorder = build(cfg.method), build_datamodule(cfg, images), RecordEpochs()
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[recorder], accumulate_grad_batches=accumulated,
    )  # fmt: skip
    trainer.fit(method, datamodule)
    return recorder, cfg


def test_gcc_leaves_extra_images_out_once_there_is_a_graph():
    recorder, cfg = fit_digits("method=gcc", "method.warmup_epochs=2", num_extra=1024, epochs=4)
    assert recorder.kinds == ["XXFFFF"] * 2 + ["FFFF"] * 2
    assert recorder.steps == [6, 12, 16, 20]
    schedule, lr = build(cfg.method.schedule), cfg.method.optimizer.lr
    for epoch, rates in enumerate(recorder.rates):
        assert rates == {round(lr * schedule(epoch + 1, 1), 12)}, "the rate changes once per epoch, whatever its length"


def test_cc_keeps_extra_images_in_every_epoch():
    recorder, _ = fit_digits("method=cc", num_extra=1024, epochs=3)
    assert recorder.kinds == ["XXFFF"] * 3


def test_accumulation_over_the_end_of_an_epoch_makes_whole_steps():
    recorder, _ = fit_digits("method=propos", num_extra=0, epochs=5, accumulated=2)
    assert recorder.kinds == ["FFFF", "FF", "FFFF", "FF", "FFFF"], "passes have three batches"
    assert recorder.steps == [2, 3, 5, 6, 8]


class StopInSecondEpoch(Callback):
    """Ends a run in its second epoch, which begins in the middle of the first pass's remains."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7:
            raise InterruptedError


@pytest.mark.slow
def test_accumulation_over_the_end_of_an_epoch_goes_on_after_an_interruption(tmp_path):
    settings = ["method=propos", "hardware=cpu", "trainer.max_epochs=3", "+trainer.accumulate_grad_batches=2"]
    settings += ["method.hidden_size=64", "batch_size=256", "evaluation.kmeans_restarts=1", "report.map_points=0"]
    settings += ["callbacks.checkpoint.min_seconds=0", "callbacks.checkpoint.every_n_steps=1"]
    stop = "+callbacks.stop._target_=tests.methods.test_extra_images.StopInSecondEpoch"
    states = []
    for name in ("whole", "interrupted"):
        (tmp_path / name).mkdir()
        if name == "interrupted":
            with pytest.raises(InterruptedError):
                run(compose_train(*settings, stop), tmp_path / name)
        assert run(compose_train(*settings), tmp_path / name)["steps"] == 11, "22 batches in whole steps of two"
        states.append(torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
