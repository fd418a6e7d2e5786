"""The options of conf/hardware make training faster and do not change what is learned."""

import csv
from types import SimpleNamespace

import pytest
import torch

from deepclust.commands.train import run
from deepclust.config.build import build
from deepclust.errors import InputError
from deepclust.runs.assemble import build_datamodule
from deepclust.runs.resolve_config import resolve_config
from tests.conftest import compose_train
from tests.fake_cuda_graphs import FakeCudaGraph, use_fake_cuda_graphs
from tests.host_waits import watch_host_operations_in_parts

LOGGED_RUN = ["trainer.log_every_n_steps=1", "trainer.max_epochs=1", "report.map_points=0"]


def read_losses(folder):
    with open(folder / "metrics.csv") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_resident_images_change_nothing(train_small):
    (results, folder), (resident_results, resident_folder) = (
        train_small(*LOGGED_RUN, f"hardware.resident_bytes={size}", name=f"resident-{size}") for size in (0, 1e6)
    )
    assert resident_results["scores"] == results["scores"]
    assert read_losses(resident_folder) == read_losses(folder)


def test_images_that_do_not_fit_are_not_resident():
    def count_resident_sources(size):
        cfg = compose_train("dataset=digits", f"hardware.resident_bytes={size}")
        images = build(cfg.dataset.source)
        cfg, _ = resolve_config(cfg, images, None)
        datamodule = build_datamodule(cfg, images)
        datamodule.trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            accumulate_grad_batches=1,
            current_epoch=0,
            max_epochs=0,
        )
        datamodule.setup("fit")
        return len(datamodule.resident_sources)

    assert count_resident_sources(1797 * 64 - 1) == 0
    assert count_resident_sources(1797 * 64) == 1


@pytest.mark.parametrize("name", ["SGD", pytest.param("Adam", marks=pytest.mark.slow)])
def test_a_fused_optimiser_learns_the_same_but_for_rounding(train_small, name):
    optimizer = [] if name == "SGD" else ["method.optimizer._target_=torch.optim.Adam", "~method.optimizer.momentum"]
    losses, fused_losses = (
        read_losses(train_small(*LOGGED_RUN, *optimizer, f"hardware.fused_optimizer={fused}", name=f"fused-{fused}")[1])
        for fused in ("false", "true")
    )
    assert len(losses) == 7 and fused_losses == pytest.approx(losses, rel=1e-3)


@pytest.mark.slow
def test_a_fused_optimiser_takes_weights_that_get_their_first_gradient_later(tmp_path):
    def train_and_read_losses(fused):
        short = ["trainer.max_epochs=2", "+trainer.limit_train_batches=2", "trainer.log_every_n_steps=1"]
        overrides = ["method=gcc", "method.warmup_epochs=1", *short, "report.map_points=0", "hardware=cpu"]
        folder = tmp_path / fused
        folder.mkdir()
        run(compose_train(*overrides, f"hardware.fused_optimizer={fused}"), folder)
        return read_losses(folder)

    losses, fused_losses = train_and_read_losses("false"), train_and_read_losses("true")
    assert len(losses) == 4 and fused_losses == pytest.approx(losses, rel=1e-3)


METHODS_AND_OVERRIDES = [  # different parts are replayed in each
    "propos",
    "propos method.step_order=joint method.queue_size=96 method.warmup_epochs=1 trainer.max_epochs=3",
    "secu",
    "secu method.balance=entropy method.predictor=true batch_size=100",
    "byol",
    "cc",
    "coke",
    "coke method.averaging_epochs=2 method.num_slots=2 method.predictor_weight=0.5 trainer.max_epochs=4",
    # DigPro calls its predictor four times in a step, and replay adds up the gradients in another order: the last bits
    # may differ, on some processors in 32 bits too, so all of its variants are compared in 64 bits.
    "digpro trainer.precision=64-true",
    "digpro trainer.precision=64-true method.warmup_epochs=1 method.group_reset_every_n_steps=2",
    "digpro trainer.precision=64-true method.warmup_epochs=1 +trainer.accumulate_grad_batches=2",
    "decs before.trainer.max_epochs=1",
    "drc",
    "gcc method.warmup_epochs=1 trainer.max_epochs=3",
    "generative_calibration before.trainer.max_epochs=1 method.first_diffusion_epochs=1 method.images_per_cluster=3",
    "lnscc method.centres_after_epochs=1 method.clustering_after_epochs=1",
    "scan",
    "self_evoc before.trainer.max_epochs=1 method.classifier_epochs=1",
    "self_label",
    "tcc",
]


QUICK = ("propos", "secu", "cc", "coke")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in METHODS_AND_OVERRIDES]
)
def test_replay_changes_no_bit_of_what_is_learned(case, tmp_path, monkeypatch):
    name, *overrides = case.split()

    def train_and_read_losses(graphs):
        short = ["trainer.max_epochs=2", "+trainer.limit_train_batches=3", "trainer.log_every_n_steps=1"]
        options = ["batch_size=64", "report.map_points=0", f"hardware.graphs={graphs}"]
        folder = tmp_path / graphs
        folder.mkdir()
        results = run(compose_train(f"method={name}", "hardware=cpu", *short, *options, *overrides), folder)
        return read_losses(folder), results["scores"]

    losses, scores = train_and_read_losses("false")
    use_fake_cuda_graphs(monkeypatch)
    host_operations = watch_host_operations_in_parts(monkeypatch)
    replayed_graphs, replay = [], FakeCudaGraph.replay

    def replay_and_note(graph):
        replayed_graphs.append(graph)
        replay(graph)

    monkeypatch.setattr(FakeCudaGraph, "replay", replay_and_note)
    replayed_losses, replayed_scores = train_and_read_losses("true")
    if "trainer.precision=64-true" in overrides:
        assert replayed_losses == pytest.approx(losses, rel=1e-12)
    else:
        assert replayed_losses == losses
    assert replayed_scores == scores
    assert replayed_graphs or name == "self_label"  # its networks are in a list, not children of the method
    assert not any(host_operations.values()), host_operations


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compile_modes_that_make_their_own_graphs_are_refused(mode, train_small):
    with pytest.raises(InputError, match=mode):
        train_small(f"hardware.compile={mode}")


@pytest.mark.parametrize("name", ["propos", "digpro"])
def test_positive_sampling_is_not_rounded_away_in_bfloat16(name):
    cfg = compose_train("dataset=digits", f"method={name}", "method.hidden_size=64")
    cfg, _ = resolve_config(cfg, build(cfg.dataset.source), None)
    method = build(cfg.method)
    q = torch.randn(32, cfg.method.embedding_size).bfloat16()
    noise = (1e-3 * torch.randn(q.shape)).bfloat16()
    exact = method.predict(q.float(), noise.float()) - method.predict(q.float(), torch.zeros(q.shape))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        difference = method.predict(q, noise) - method.predict(q, torch.zeros_like(q))
    torch.testing.assert_close(difference, exact)


@pytest.mark.slow
def test_all_fast_options_together_learn_like_the_default_run(train_small):
    fast = ["compile=default", "precision=bf16-mixed", "fused_optimizer=true", "resident_bytes=1e9", "benchmark=true"]
    overrides = [*LOGGED_RUN, "trainer.max_epochs=4"]
    results, folder = train_small(*overrides)
    fast_results, fast_folder = train_small(*overrides, *(f"hardware.{option}" for option in fast), name="fast")
    assert read_losses(fast_folder) == pytest.approx(read_losses(folder), rel=0.02)
    assert fast_results["scores"]["kmeans"]["acc"] == pytest.approx(results["scores"]["kmeans"]["acc"], abs=0.05)
