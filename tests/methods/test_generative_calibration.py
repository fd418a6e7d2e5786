"""Generative calibration: its rounds, who learns in which epoch, the generated images and the three losses."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.commands.train import run
from deepclust.errors import InputError
from deepclust.methods.cc import CC
from deepclust.methods.generative_calibration import (
    GenerativeCalibration,
    class_matching_loss,
    class_separation_loss,
    locate_epoch,
    reliability,
    reliable_metric_loss,
)
from deepclust.nn.conditional_diffusion import ConditionalDiffusion
from deepclust.nn.schedules import Constant
from tests.conftest import compose_train
from tests.methods.test_contract import (
    FREQUENT_CALLBACKS,
    SMALL_RUN,
    InterruptSecondEpoch,
    compose_small_run,
    load_last_state,
    read_logged_terms,
)
from tests.processes import TWO_PROCESSES, run_deepclust

K, BATCH, NUM_IMAGES, PER_CLUSTER = 3, 6, 12, 4
ADAM = partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1)


def make_model(method=CC, num_clusters=K, num_views=2):
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU())
    backbone.num_features = 5
    model = method(
        backbone=backbone,
        num_clusters=num_clusters,
        embedding_size=4,
        instance_temperature=0.5,
        cluster_temperature=1.0,
        optimizer=ADAM,
        schedule=Constant(),
    )
    model.num_views = num_views
    return model


class Clusterless(CC):
    """A method without a clustering of its own."""

    def cluster_logits(self, features):
        return None


def make_method(*, model="cc", **numbers):
    torch.manual_seed(0)
    arguments = {
        "matching_weight": 1.0,
        "separation_weight": 0.1,
        "metric_weight": 0.5,
        "first_diffusion_epochs": 2,
        "later_diffusion_epochs": 1,
        "calibration_epochs": 2,
        **numbers,
    }
    return GenerativeCalibration(
        model=make_model() if model == "cc" else model,
        diffusion=ConditionalDiffusion(
            num_clusters=K,
            channels=1,
            image_size=4,
            widths=[4],
            layers_per_level=1,
            attention=False,
            num_steps=10,
            beta_start=0.01,
            beta_end=0.5,
            num_sampling_steps=5,
            guidance=1.5,
        ),
        num_images=NUM_IMAGES,
        num_clusters=K,
        images_per_cluster=PER_CLUSTER,
        dropped_share=0.1,
        width_factors=[0.5, 1.0],
        margin=1.0,
        temperature=0.5,
        optimizer=ADAM,
        diffusion_optimizer=ADAM,
        schedule=Constant(),
        **arguments,
    )


class TrainerStub:
    def __init__(self, epoch):
        self.current_epoch, self.global_step = epoch, 0


def take_step(method, epoch):
    """Do what Lightning does in a step of this epoch; return the names of the terms and of the weights that changed."""
    method._trainer = TrainerStub(epoch)
    before = {name: p.clone() for name, p in method.named_parameters()}
    images = torch.rand(3, BATCH, 1, 4, 4, generator=torch.Generator().manual_seed(epoch))
    terms = method.losses(TrainBatch(tuple(images), torch.arange(BATCH), Draws((0, epoch), 0, BATCH)))
    optimizer = method.make_optimizer(method.parameter_groups())
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in method.parameters()), "DDP waits for a gradient of every parameter"
    method.on_before_optimizer_step(optimizer)
    optimizer.step()
    return set(terms), {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}


# Rounds


def test_rounds_have_epochs_of_the_diffusion_model_and_then_of_the_clustering():
    locate = partial(locate_epoch, first_diffusion_epochs=3, later_diffusion_epochs=1, calibration_epochs=2)
    first = [(1, place, 3) for place in range(5)]
    later = [(number, place, 1) for number in (2, 3) for place in range(3)]
    assert [locate(epoch) for epoch in range(11)] == first + later


def test_each_epoch_trains_one_of_the_two():
    method = make_method()
    method.e_step(torch.rand(NUM_IMAGES, 5), ())
    terms, changed = take_step(method, epoch=1)
    assert terms == {"diffusion"} and all(name.startswith("diffusion.") for name in changed) and len(changed) > 10
    method.generate(("key",))
    terms, changed = take_step(method, epoch=2)
    calibration = {"class_matching", "class_separation", "reliable_metric"}
    assert terms == {"instance", "cluster", "balance"} | calibration
    assert changed == {f"backbone.{name}" for name, _ in method.model.named_parameters()}


def test_without_weights_the_earlier_run_goes_on():
    method = make_method(matching_weight=0.0, separation_weight=0.0, metric_weight=0.0)
    terms, changed = take_step(method, epoch=0)
    assert terms == {"instance", "cluster", "balance"}
    assert all(name.startswith("backbone.") for name in changed)
    assert method.sample_images(()) is None


def test_pseudo_labels_are_the_clusters_of_the_clustering():
    method, features = make_method(), torch.rand(NUM_IMAGES, 5)
    method.e_step(features, ())
    assert torch.equal(method.pseudo_labels, method.model.cluster_logits(features).argmax(1))
    assert torch.equal(method.e_step_assignments(), method.pseudo_labels)


# Generated images


def test_only_clusters_with_images_have_generated_ones():
    method = make_method()
    method.pseudo_labels.copy_(torch.arange(NUM_IMAGES) % 2 * 2)  # clusters 0 and 2
    method.generate(("key",))
    assert torch.bincount(method.conditions, minlength=K).tolist() == [6, 0, 6]
    samples = method.sample_images(("any",))
    assert samples.shape == (K, PER_CLUSTER, 1, 4, 4) and samples.min() >= 0 and samples.max() <= 1
    rows = {cluster: (method.conditions == cluster).nonzero()[:PER_CLUSTER, 0] for cluster in (0, 2)}
    for cluster, own_rows in rows.items():
        assert torch.equal(samples[cluster], method.generated[own_rows] / 255)
    assert not samples[1].any()


@pytest.mark.parametrize("cluster", range(K))
def test_one_cluster_may_hold_all_images(cluster):
    method = make_method()
    method.pseudo_labels.fill_(cluster)
    method.generate(("key",))
    assert (method.conditions == cluster).all()
    terms, _ = take_step(method, epoch=2)
    assert all(p.isfinite().all() for p in method.parameters()) and "reliable_metric" in terms
    shown = [k for k, images in enumerate(method.sample_images(())) if images.any()]
    assert shown == [cluster]


def test_the_key_decides_on_the_images_and_the_agreement_is_the_share_in_their_condition():
    method = make_method()
    method.e_step(torch.rand(NUM_IMAGES, 5), ())
    generated = []
    for key in ("a", "a", "b"):
        method.generate((key,))
        generated.append(method.generated.clone())
    assert torch.equal(generated[0], generated[1]) and not torch.equal(generated[0], generated[2])
    clusters = method.cluster_logits(method.encode(generated[2] / 255)).argmax(1)
    assert float(method.agreement) == pytest.approx(float((clusters == method.conditions).float().mean()))


# What it starts from


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "start and before are null"),
        (lambda: make_model(num_clusters=4), r"set dataset\.num_clusters=4"),
        (lambda: make_model(num_views=1), "more than a loss of two views"),
        (lambda: make_method(), "run is of GenerativeCalibration, whose training is more"),
    ],
)
def test_other_earlier_runs_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make_method(model=make())


def test_a_method_without_clusters_is_refused():
    with pytest.raises(InputError, match="Clusterless, which has no clustering of its own"):
        make_method(model=make_model(Clusterless)).e_step(torch.rand(NUM_IMAGES, 5), ())


# Losses


def test_matching_and_separation_are_means_over_the_pairs_that_count():
    distances = torch.tensor([[0.3, 0.2, 9.0], [0.6, 0.5, 9.0], [1.5, 9.0, 9.0]])
    counts = torch.tensor([[True, True, False], [True, True, False], [True, False, False]])
    assert class_matching_loss(distances, counts) == pytest.approx((0.3 + 0.5) / 2)
    expected = ((1 - 0.2) + (1 - 0.6) + 0) / 3
    assert class_separation_loss(distances, counts, margin=1.0) == pytest.approx(expected)
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    assert class_matching_loss(distances, nothing) == class_separation_loss(distances, nothing, margin=1.0) == 0


def test_metric_loss_is_that_of_a_loop_over_generated_images():
    torch.manual_seed(0)
    generated, real, logits = torch.randn(5, 4).double(), torch.randn(6, 4).double(), torch.randn(5, 3).double()
    conditions, pseudo_labels = torch.tensor([0, 1, 2, 2, 0]), torch.tensor([0, 0, 1, 1, 1, 0])
    weights = reliability(logits, conditions)
    total, total_weight = 0.0, 0.0
    for i in range(5):
        assert float(weights[i]) == pytest.approx(float(logits[i].softmax(0)[conditions[i]]))
        cosines = [float(torch.cosine_similarity(generated[i], f, dim=0)) / 0.5 for f in real]
        log_sum = math.log(sum(map(math.exp, cosines)))
        partners = [c - log_sum for c, y in zip(cosines, pseudo_labels, strict=True) if y == conditions[i]]
        if partners:
            total -= float(weights[i]) * sum(partners) / len(partners)
            total_weight += float(weights[i])
    loss = reliable_metric_loss(generated, conditions, weights, real, pseudo_labels, temperature=0.5)
    assert float(loss) == pytest.approx(total / total_weight)


@pytest.mark.parametrize(
    ("case", "expected"),
    [("no partner", 0.0), ("none is reliable", 0.0), ("hardly reliable", math.log(3)), ("zero rows", math.log(3))],
)
def test_metric_loss_of_degenerate_batches(case, expected):
    rows = torch.zeros if case == "zero rows" else torch.ones
    generated, real = (rows(3, 4).requires_grad_() for _ in range(2))
    conditions = torch.full((3,), int(case == "no partner"))
    weights = torch.full((3,), {"none is reliable": 0.0, "hardly reliable": 1e-30}.get(case, 1.0))
    pseudo_labels = torch.zeros(3, dtype=torch.int64)
    loss = reliable_metric_loss(generated, conditions, weights, real, pseudo_labels, temperature=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert generated.grad.isfinite().all() and real.grad.isfinite().all()


def test_metric_loss_of_one_image_and_its_partner_is_zero():
    id_ = torch.zeros(1, dtype=torch.int64)
    loss = reliable_metric_loss(torch.rand(1, 4), id_, torch.ones(1), torch.rand(1, 4), id_, temperature=0.1)
    assert loss == 0


# Whole runs of two rounds

TWO_ROUNDS = [
    *("method.first_diffusion_epochs=1", "method.later_diffusion_epochs=1", "method.calibration_epochs=1"),
    *("method.images_per_cluster=5", "method.diffusion.num_sampling_steps=5", "method.diffusion.widths=[16,16]"),
]


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory):
    """Return the folder of a finished run of two rounds."""
    folder = tmp_path_factory.mktemp("two_rounds")
    cfg = compose_small_run("generative_calibration", *FREQUENT_CALLBACKS, *TWO_ROUNDS)
    cfg.trainer.max_epochs = 4
    run(cfg, folder)
    return folder


@pytest.mark.slow
def test_a_run_of_two_rounds_shows_what_it_has_generated(two_rounds):
    state = load_last_state(two_rounds)
    assert state["rounds_generated"] == 2 and state["generated"].float().std() > 10
    assert "generated images, none of the data set" in (two_rounds / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 2, 3])  # of the clustering after generation, of the diffusion model, as the first
def test_a_run_that_was_interrupted_generates_the_same(epoch, two_rounds, tmp_path, monkeypatch):
    def interrupt(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == epoch and batch_idx == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(InterruptSecondEpoch, "on_train_batch_end", interrupt)
    callback = "+callbacks.interrupt._target_=tests.methods.test_contract.InterruptSecondEpoch"
    for extra in ([callback], []):
        cfg = compose_small_run(
            "generative_calibration", *FREQUENT_CALLBACKS, "callbacks.checkpoint.every_n_steps=1", *TWO_ROUNDS, *extra
        )
        cfg.trainer.max_epochs, cfg.start = 4, str(two_rounds / "before")
        if extra:
            with pytest.raises(KeyboardInterrupt):
                run(cfg, tmp_path)
        else:
            run(cfg, tmp_path)
    state = load_last_state(tmp_path)
    for key, value in load_last_state(two_rounds).items():
        assert torch.equal(state[key], value), key


@pytest.mark.slow
def test_two_processes_calibrate_as_one(two_rounds, tmp_path):
    """In float64, with batch statistics over all processes, on few images; the last of three batches is small."""
    overrides = ["method=generative_calibration", *SMALL_RUN, *FREQUENT_CALLBACKS, *TWO_ROUNDS, "trainer.max_epochs=4"]
    overrides += [f"start={two_rounds / 'before'}", "hardware.precision=64-true", "sync_batchnorm=true"]
    overrides += ["dataset.imbalance=0.01", "batch_size=200", "drop_last=false", "trainer.log_every_n_steps=1"]
    run_deepclust("train", *overrides, "hardware=cpu", f"hydra.run.dir={tmp_path / 'one'}")
    run_deepclust("train", *overrides, *TWO_PROCESSES, f"hydra.run.dir={tmp_path / 'two'}")
    one, two = (load_last_state(tmp_path / name) for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=key: f"{n}: {m}")
    logged_by_one, logged_by_two = (read_logged_terms(tmp_path / name) for name in ("one", "two"))
    assert {"train/diffusion", "train/class_matching", "train/reliable_metric"} <= set().union(*logged_by_one)
    for values_of_one, values_of_two in zip(logged_by_one, logged_by_two, strict=True):
        assert values_of_two == pytest.approx(values_of_one, rel=1e-5, abs=1e-9)


def test_the_first_round_needs_a_diffusion_model_that_has_learned(tmp_path):
    cfg = compose_train("method=generative_calibration", "hardware=cpu", "method.first_diffusion_epochs=0")
    with pytest.raises(InputError, match=r"method\.first_diffusion_epochs"):
        run(cfg, tmp_path)


def test_without_an_earlier_run_it_is_said_what_to_set(tmp_path):
    cfg = compose_train("method=generative_calibration", "hardware=cpu", "before=null")
    with pytest.raises(InputError, match="start and before are null"):
        run(cfg, tmp_path)
