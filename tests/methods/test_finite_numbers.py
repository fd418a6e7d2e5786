"""Numbers that are not finite end a run, or what is done with it, in one line that says where they are."""

import importlib

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from lightning import Callback

from deepclust.clustering.assignment_rules import assign_by_own_rule, assign_to_centroids
from deepclust.commands.train import run
from deepclust.config.build import build
from deepclust.errors import InputError
from deepclust.methods.propos import ProPos
from deepclust.methods.scan import disagreements
from tests.conftest import compose_train

SMALL_RUN = ["hardware=cpu", "backbone=conv_small", "report.map_points=0", "pixel_baseline_max_values=0"]
SMALL_RUN += ["evaluation.kmeans_restarts=1", "trainer.max_epochs=1", "+trainer.limit_train_batches=3"]
POISON = "+callbacks.poison._target_=tests.methods.test_finite_numbers.PoisonAfterLastStep"


class PoisonAfterLastStep(Callback):
    """Makes a number of the method NaN when all losses of the run have been computed."""

    def __init__(self, name):
        self.name = name

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == trainer.num_training_batches:
            pl_module.state_dict()[self.name].flatten()[0] = torch.nan


def test_scan_at_an_absurd_learning_rate_is_stopped_by_the_guard(tmp_path):
    stages = ["before.trainer.max_epochs=1", "+before.trainer.limit_train_batches=2"]
    cfg = compose_train("method=scan", *SMALL_RUN, *stages, "method.optimizer.lr=1e30")
    with pytest.raises(InputError, match=r"the loss of step 2 is not a finite number.*method\.optimizer\.lr"):
        run(cfg, tmp_path)
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "checkpoints/last.ckpt").exists()


def test_the_disagreement_of_no_numbers_is_no_number_and_others_are_as_before():
    p = torch.tensor([[0.2, 0.8], [torch.nan, 0.5], [1.0, 0.0]], requires_grad=True)
    q = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]])
    losses = disagreements(p, q)
    assert losses.isnan().tolist() == [False, True, False]
    assert losses[0] == -torch.tensor(0.5).log() and losses[2] == 100
    losses.nansum().backward()
    assert p.grad[0].isfinite().all()


@pytest.mark.parametrize("callbacks", ["default", "none"])
@pytest.mark.parametrize("name", ["backbone.layers.0.weight", "target.backbone.layers.1.running_var"])
def test_weights_that_are_no_numbers_are_not_saved_and_end_no_run(callbacks, name, tmp_path):
    overrides = [f"callbacks={callbacks}", POISON, f"+callbacks.poison.name={name}"]
    with pytest.raises(InputError, match=rf"weights after step 3 are not finite numbers \({name}\).*finite weights"):
        run(compose_train("method=propos", *SMALL_RUN, *overrides), tmp_path)
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "checkpoints/last.ckpt").exists()


def test_a_large_learning_rate_whose_last_step_ruins_the_weights_ends_no_run(tmp_path):
    """The losses of all steps are finite; the weights are not, after the last one."""
    overrides = ["method.optimizer.lr=1e38", "+trainer.gradient_clip_val=1e4", "method.warmup_epochs=0"]
    cfg = compose_train("method=gcc", *SMALL_RUN, *overrides)
    cfg.trainer.limit_train_batches = 1
    with pytest.raises(InputError, match=r"not (a )?finite number"):
        run(cfg, tmp_path)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("logit", [torch.nan, torch.inf])
def test_logits_without_probabilities_are_refused_and_minus_infinity_is_a_probability_of_zero(logit):
    features = torch.zeros(5, 3)
    bad, good = torch.tensor([[0.0, 1.0]]).repeat(5, 1), torch.tensor([[-torch.inf, 1.0]]).repeat(5, 1)
    bad[3, 1] = logit
    with pytest.raises(InputError, match=r"logits of 1 of 5 images.*cluster_logits"):
        assign_by_own_rule(lambda _: bad, features, num_clusters=bad.shape[1])
    assert assign_by_own_rule(lambda _: good, features, num_clusters=good.shape[1])[1].tolist() == [1.0] * 5
    with pytest.raises(InputError, match="logits of 5 of 5 images"):
        assign_to_centroids(features, torch.full((2, 3), torch.nan), torch.tensor(1.0))


class OwnRuleOfNaN(ProPos):
    """A method of somebody's own whose rule divides by zero."""

    def cluster_logits(self, features):
        return super().cluster_logits(features) * 0 / 0


def test_an_own_rule_that_gives_no_numbers_ends_no_run(tmp_path):
    target = "method._target_=tests.methods.test_finite_numbers.OwnRuleOfNaN"
    with pytest.raises(InputError, match="cluster_logits"):
        run(compose_train("method=propos", *SMALL_RUN, target), tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_features_that_are_no_numbers_are_told_apart_from_weights():
    vectors = ["dataset=features", "dataset.path=none", "dataset.channels=2", "dataset.num_clusters=3"]
    method = build(compose_train("method=kmeans", *vectors).method)
    images = torch.ones(4, 2, 1, 1)
    images[2:, 0] = torch.inf
    with pytest.raises(InputError, match=r"features of 2 of 4 images are not finite numbers.*KMeans\.encode"):
        method.encode_all([images[:3], images[3:]], 4)
    method.centroids.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"weights are not finite numbers \(centroids\)"):
        method.encode_all([images], 4)


def test_a_run_with_weights_that_are_no_numbers_is_used_for_nothing(tmp_path, train_small):
    _, folder = train_small("trainer.max_epochs=1")
    file = folder / "checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["state_dict"]["target.backbone.layers.0.weight"][0] = torch.nan
    torch.save(checkpoint, file)
    np.save(tmp_path / "images.npy", np.zeros((3, 8, 8), np.uint8))
    for verb, *overrides in (
        ("predict", f"run={folder}", f"images={tmp_path}/images.npy", f"output={tmp_path}/out"),
        ("evaluate", f"run={folder}"),
        ("features", f"run={folder}", f"output={tmp_path}/out"),
        ("export", f"run={folder}", "format=torchscript", f"output={tmp_path}/out"),
    ):
        with initialize_config_module("deepclust.conf", version_base="1.3"):
            cfg = compose(verb, overrides=overrides)
        with pytest.raises(InputError, match=r"weights are not finite numbers \(target\.backbone\.layers\.0\.weight\)"):
            importlib.import_module(f"deepclust.commands.{verb}").main(cfg)
        assert not (tmp_path / "out").exists()
