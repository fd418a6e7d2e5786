"""Switches of conf/hardware: faster, and what is learned stays the same."""

import csv
from types import SimpleNamespace

import pytest
import torch

from deepclust.commands.train import run
from deepclust.config.build import build
from deepclust.errors import InputError
from deepclust.runs.assemble import build_datamodule
from deepclust.runs.resolve import resolve_config
from tests.conftest import compose_train
from tests.cuda_graph_stand_in import Tape, stand_in
from tests.host_waits import watch_parts

WATCHED = ["trainer.log_every_n_steps=1", "trainer.max_epochs=1", "report.map_points=0"]


def losses(folder):
    with open(folder / "metrics.csv") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_resident_images_change_nothing(run_small):
    (plain, first), (resident, second) = (
        run_small(*WATCHED, f"hardware.resident_bytes={size}", name=f"resident-{size}") for size in (0, 1e6)
    )
    assert plain["scores"] == resident["scores"] and losses(first) == losses(second)


def test_images_that_do_not_fit_are_not_held():
    def held(size):
        cfg = compose_train("dataset=digits", f"hardware.resident_bytes={size}")
        images = build(cfg.dataset.source)
        cfg, _ = resolve_config(cfg, images, None)
        datamodule = build_datamodule(cfg, images)
        datamodule.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
        datamodule.setup("fit")
        return len(datamodule.resident)

    assert (held(1797 * 64 - 1), held(1797 * 64)) == (0, 1)


@pytest.mark.parametrize("name", ["SGD", pytest.param("Adam", marks=pytest.mark.slow)])
def test_a_fused_optimiser_learns_the_same_but_for_rounding(run_small, name):
    chosen = [] if name == "SGD" else ["method.optimizer._target_=torch.optim.Adam", "~method.optimizer.momentum"]
    plain, fused = (
        losses(run_small(*WATCHED, *chosen, f"hardware.fused_optimizer={on}", name=f"fused-{on}")[1])
        for on in ("false", "true")
    )
    assert len(plain) == 7 and fused == pytest.approx(plain, rel=1e-3)


@pytest.mark.slow
def test_a_fused_optimiser_takes_weights_that_begin_to_move_later(tmp_path):
    def learned(on):
        short = ["trainer.max_epochs=2", "+trainer.limit_train_batches=2", "trainer.log_every_n_steps=1"]
        told = ["method=gcc", "method.warmup_epochs=1", *short, "report.map_points=0", "hardware=cpu"]
        folder = tmp_path / on
        folder.mkdir()
        run(compose_train(*told, f"hardware.fused_optimizer={on}"), folder)
        return losses(folder)

    plain, fused = learned("false"), learned("true")
    assert len(plain) == 4 and fused == pytest.approx(plain, rel=1e-3)


METHODS = [  # that differ in what is replayed
    "propos",
    "propos method.step_order=joint method.queue_size=96 method.warmup_epochs=1 trainer.max_epochs=3",
    "secu",
    "secu method.balance=entropy method.predictor=true batch_size=100",
    "byol",
    "cc",
    "coke",
    "coke method.averaging_epochs=2 method.num_slots=2 method.predictor_weight=0.5 trainer.max_epochs=4",
    "digpro",
    # Called four times in a step, the predictor gets its gradients added up in another order.
    "digpro trainer.precision=64-true method.warmup_epochs=1 method.group_reset_every_n_steps=2",
    "digpro trainer.precision=64-true method.warmup_epochs=1 +trainer.accumulate_grad_batches=2",
    "drc",
    "gcc method.warmup_epochs=1 trainer.max_epochs=3",
    "lnscc method.centres_after_epochs=1 method.clustering_after_epochs=1",
    "scan",
    "self_label",
]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in METHODS[-2:])) for n in METHODS])
def test_replayed_it_learns_the_same_to_the_last_bit(name, tmp_path, monkeypatch):
    name, *chosen = name.split()

    def learned(graphs):
        short = ["trainer.max_epochs=2", "+trainer.limit_train_batches=3", "trainer.log_every_n_steps=1"]
        sizes = ["batch_size=64", "report.map_points=0", f"hardware.graphs={graphs}"]
        folder = tmp_path / graphs
        folder.mkdir()
        results = run(compose_train(f"method={name}", "hardware=cpu", *short, *sizes, *chosen), folder)
        return losses(folder), results["scores"]

    plain = learned("false")
    stand_in(monkeypatch)
    recorded, host = [], watch_parts(monkeypatch)
    monkeypatch.setattr(Tape, "replay", lambda tape, replay=Tape.replay: recorded.append(tape) or replay(tape))
    found = learned("true")
    exact = "trainer.precision=64-true" not in chosen
    assert found == plain if exact else found[0] == pytest.approx(plain[0], rel=1e-12) and found[1] == plain[1]
    assert recorded or name == "self_label"  # whose networks lie deeper
    assert not any(host.values()), host


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_that_make_graphs_of_their_own_are_refused(mode, run_small):
    with pytest.raises(InputError, match=mode):
        run_small(f"hardware.compile={mode}")


@pytest.mark.parametrize("name", ["propos", "digpro"])
def test_positive_sampling_is_not_rounded_away_in_bfloat16(name):
    cfg = compose_train("dataset=digits", f"method={name}", "method.hidden_size=64")
    cfg, _ = resolve_config(cfg, build(cfg.dataset.source), None)
    method = build(cfg.method)
    q = torch.randn(32, cfg.method.embedding_size).bfloat16()
    noise = (1e-3 * torch.randn(q.shape)).bfloat16()
    exact = method.predict(q.float(), noise.float()) - method.predict(q.float(), torch.zeros(q.shape))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved = method.predict(q, noise) - method.predict(q, torch.zeros_like(q))
    torch.testing.assert_close(moved, exact)


@pytest.mark.slow
def test_compiled_in_bfloat16_and_resident_it_learns_like_the_plain_run(run_small):
    fast = ["compile=default", "precision=bf16-mixed", "fused_optimizer=true", "resident_bytes=1e9", "benchmark=true"]
    plain, first = run_small(*WATCHED, "trainer.max_epochs=4")
    quick, second = run_small(*WATCHED, "trainer.max_epochs=4", *(f"hardware.{switch}" for switch in fast), name="fast")
    assert losses(second) == pytest.approx(losses(first), rel=0.02)
    assert quick["scores"]["kmeans"]["acc"] == pytest.approx(plain["scores"]["kmeans"]["acc"], abs=0.05)
