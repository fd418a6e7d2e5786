"""SCAN's first two stages: losses against slow versions, neighbours, the selection of a head, and joined stages."""

import math
import shutil
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.commands.train import run
from deepclust.errors import InputError
from deepclust.methods import scan
from deepclust.methods.scan import SCAN, Pretext, entropy, pretext_loss, scan_losses, selection_losses
from deepclust.nn.schedules import Constant
from deepclust.runs.assemble import build_trainer
from deepclust.runs.checkpoint import load_checkpoint, load_method
from deepclust.runs.run_folder import CHECKPOINT, RESULTS
from tests.conftest import compose_train

IMAGES, CLUSTERS = 30, 4


def make_backbone():
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    net.num_features = 6
    return net


COMMON = {"num_clusters": CLUSTERS, "optimizer": partial(torch.optim.SGD, lr=0.1), "schedule": Constant()}


def make_method(*, mine_on="projection", heads=2, train_backbone=True, neighbors=3, select="last_epoch"):
    torch.manual_seed(0)
    return SCAN(
        backbone=make_backbone(),
        num_images=IMAGES,
        num_heads=heads,
        num_neighbors=neighbors,
        mine_on=mine_on,
        embedding_size=3,
        train_backbone=train_backbone,
        entropy_weight=5.0,
        select=select,
        e_step_every_n_epochs=1,
        **COMMON,
    )


def make_pretext(seed=1):
    torch.manual_seed(seed)
    return Pretext(backbone=make_backbone(), embedding_size=3, temperature=0.1, **COMMON)


def make_trainer(images):
    """Return a stand-in for a trainer whose data module gives the clean images (M, 5) in two batches."""
    datamodule = SimpleNamespace(fit=images, clean_batches=lambda source, device: iter(source.split(17)))
    return SimpleNamespace(datamodule=datamodule, lightning_module=None)


def make_started_method(images, **options):
    """Return a method that has mined neighbours of the images (M, 5) on a pretext run."""
    method = make_method(**options)
    method.start_from(make_pretext().eval())
    method._trainer = make_trainer(images)
    method.on_train_start()
    return method


def read_networks(state):
    """Return the tensors of the backbone and the heads of a state_dict."""
    return {name: value for name, value in state.items() if name.startswith(("backbone.", "heads."))}


def make_batch(size, extra=False):
    views = torch.randn(2, size, 5)
    draws = Draws(key=(0,), first_row=0, global_batch_size=size)
    return TrainBatch((views[0],), torch.arange(size), draws, extra, (views[1],), torch.arange(size)[:, None])


# Losses


@pytest.mark.parametrize("size", [1, 2, 7])
def test_pretext_loss_is_its_equation(size):
    a, b = nn.functional.normalize(torch.randn(2, size, 4, dtype=torch.float64), dim=2)
    rows, total = [*a, *b], 0.0
    for i in range(size):
        others = [math.exp(float(a[i] @ row) / 0.1) for j, row in enumerate(rows) if j != i]
        total -= math.log(math.exp(float(a[i] @ b[i]) / 0.1) / sum(others))
    assert float(pretext_loss(a, b, temperature=0.1)) == pytest.approx(total / size, rel=1e-9, abs=1e-12)


def test_pretext_views_pass_the_backbone_in_one_batch():
    method, batch_sizes = make_pretext(), []
    method.backbone.register_forward_hook(lambda module, args, output: batch_sizes.append(len(output)))
    views = tuple(torch.randn(2, 8, 5))
    terms = method.losses(TrainBatch(views, torch.arange(8), Draws(key=(0,), first_row=0, global_batch_size=8)))
    assert batch_sizes == [16] and 0 < float(terms["contrast"]) < 20


def slow_scan_losses(anchors, neighbors):
    """Return consistency and entropy of one head, row by row."""
    p = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in anchors.tolist()]
    q = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in neighbors.tolist()]
    disagreements = [-math.log(sum(a * b for a, b in zip(x, y, strict=True))) for x, y in zip(p, q, strict=True)]
    shares = [max(sum(row[k] for row in p) / len(p), 1e-8) for k in range(len(p[0]))]
    return sum(disagreements) / len(disagreements), -sum(s * math.log(s) for s in shares)


@pytest.mark.parametrize("size", [1, 9])
def test_scan_losses_are_their_equations_for_each_head(size):
    anchors, neighbors = 3 * torch.randn(2, 3, size, 5, dtype=torch.float64)
    consistency, entropies = scan_losses(anchors, neighbors)
    for head in range(3):
        expected = slow_scan_losses(anchors[head], neighbors[head])
        assert (float(consistency[head]), float(entropies[head])) == pytest.approx(expected, rel=1e-9)


def test_certain_and_empty_clusters_have_finite_losses_and_gradients():
    logits = torch.zeros(6, 4)
    logits[:, 0] = 200  # the softmax of the others is exactly 0
    other_logits = torch.zeros(6, 4)
    other_logits[:, 1] = 200
    logits.requires_grad_()
    consistency, entropies = scan_losses(logits, other_logits)
    (consistency - 5 * entropies).backward()
    assert float(consistency) == 100 and float(entropies) == pytest.approx(3e-8 * math.log(1e8), rel=1e-4)
    assert torch.isfinite(logits.grad).all()
    consistency, _ = scan_losses(logits, logits)
    assert float(consistency) == 0
    above_one = torch.tensor([1.0, 1e-3])  # its agreement with itself exceeds 1, as rounding may have it
    assert float(scan.disagreements(above_one, above_one)) == 0


def test_losses_are_full_precision_under_autocast():
    anchors, neighbors = torch.randn(2, 3, 16, 5)
    exact = scan_losses(anchors, neighbors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = scan_losses(anchors, neighbors)
        assert scan_losses(anchors.bfloat16(), neighbors)[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(exact, got, strict=True))


def test_a_step_encodes_images_and_neighbours_separately_and_sums_over_heads():
    method, batch, outputs = make_method(), make_batch(8), []
    method.backbone.register_forward_hook(lambda module, args, output: outputs.append(output))
    terms = method.losses(batch)
    anchors, neighbors = outputs
    assert len(anchors) == len(neighbors) == 8
    expected = [slow_scan_losses(head(anchors), head(neighbors)) for head in method.heads]
    assert float(terms["consistency"]) == pytest.approx(sum(c for c, _ in expected), rel=1e-5)
    assert float(terms["entropy"]) == pytest.approx(-5 * sum(e for _, e in expected), rel=1e-5)


def test_extra_images_are_refused():
    with pytest.raises(InputError, match=r"dataset\.source\.extra=\[\]"):
        make_method().losses(make_batch(4, extra=True))


# Neighbours


@pytest.mark.parametrize("mine_on", ["projection", "backbone"])
def test_neighbours_are_the_nearest_by_cosine_of_the_earlier_features(mine_on):
    images, pretext = torch.randn(IMAGES, 5), make_pretext().eval()
    method = make_started_method(images, mine_on=mine_on)
    rows = pretext.backbone(images)
    rows = nn.functional.normalize(pretext.projector(rows) if mine_on == "projection" else rows, dim=1)
    for image, neighbors in enumerate(method.neighbors.tolist()):
        nearest = sorted(range(IMAGES), key=lambda j, i=image: -float(rows[i] @ rows[j]))
        assert neighbors == [image, *[j for j in nearest if j != image][:3]]
    assert method.training and not any(p.requires_grad for p in (method.projector or nn.Identity()).parameters())


def test_vectors_need_no_earlier_run_and_a_network_does():
    images, method = torch.randn(IMAGES, 5), make_method(mine_on="backbone")
    method._trainer = make_trainer(images)
    with pytest.raises(InputError, match="start and before are null"):
        method.on_train_start()
    method.backbone = nn.Identity()
    method.on_train_start()
    assert int(method.neighbors.min()) >= 0


def test_neighbours_from_a_checkpoint_are_not_mined_again():
    images = torch.randn(IMAGES, 5)
    method, resumed = make_started_method(images), make_method()
    resumed.load_state_dict(method.state_dict())
    resumed.on_train_start()  # without a trainer, hence without mining
    assert torch.equal(resumed.neighbors_on_cpu, method.neighbors)


def test_companions_are_the_image_or_a_neighbour_with_equal_chances():
    method = make_started_method(torch.randn(IMAGES, 5))
    indices = torch.arange(IMAGES).repeat(400)
    companions = method.companions(indices, Draws(key=(7,), first_row=0, global_batch_size=len(indices)))
    assert companions.shape == (len(indices), 1)
    is_companion = companions == method.neighbors[indices]
    assert (is_companion.sum(1) == 1).all()
    assert (is_companion.float().mean(0) - 0.25).abs().max() < 0.015
    again = method.companions(indices, Draws(key=(7,), first_row=5, global_batch_size=len(indices)))
    assert torch.equal(companions, again), "every process draws for the whole global batch"
    assert not torch.equal(
        companions, method.companions(indices, Draws(key=(8,), first_row=0, global_batch_size=len(indices)))
    )


def test_a_missing_or_unsuitable_earlier_run_is_refused():
    method = make_method()
    method._trainer = make_trainer(torch.randn(IMAGES, 5))
    with pytest.raises(InputError, match="start=DIR"):
        method.on_train_start()
    with pytest.raises(InputError, match="mine_on=backbone"):
        make_method().start_from(make_method(mine_on="backbone"))
    make_method(mine_on="backbone").start_from(make_method())
    other = make_pretext()
    other.projector = nn.Linear(6, 9)
    with pytest.raises(InputError, match="other weights"):
        make_method().start_from(other)


def test_a_backbone_that_is_not_trained_does_not_change():
    method = make_started_method(torch.randn(IMAGES, 5), train_backbone=False)
    assert method.training and not method.backbone.training
    assert [p.shape for group in method.parameter_groups() for p in group["params"]] == [(4, 6), (4,)] * 2
    before = {name: value.clone() for name, value in method.backbone.state_dict().items()}
    method.eval().train()
    sum(method.losses(make_batch(8)).values()).backward()
    assert all(p.grad is None for p in method.backbone.parameters())
    assert all(p.grad.any() for p in method.heads.parameters())
    assert all(torch.equal(value, before[name]) for name, value in method.backbone.state_dict().items())


# The selection of a head


def test_selection_losses_are_their_equations_for_any_chunk_size(monkeypatch):
    p = (2 * torch.randn(3, IMAGES, CLUSTERS, dtype=torch.float64)).softmax(2)
    table = torch.randint(IMAGES, (IMAGES, 4))
    consistency, entropies = selection_losses(p, table)
    for head in range(3):
        agreements = [float(p[head, i] @ p[head, j]) for i in range(IMAGES) for j in table[i].tolist()]
        assert float(consistency[head]) == pytest.approx(-sum(map(math.log, agreements)) / len(agreements), rel=1e-9)
        assert float(entropies[head]) == pytest.approx(float(entropy(p[head].mean(0))), rel=1e-12)
    monkeypatch.setattr(scan, "MAX_ELEMENTS_PER_CHUNK", 50)
    torch.testing.assert_close(selection_losses(p, table), (consistency, entropies))


def test_the_head_that_agrees_with_the_neighbours_gives_the_clustering():
    """Features form four tight groups. One head finds them, one puts all into one cluster, and one is constant."""
    features = 10 * nn.functional.one_hot(torch.arange(IMAGES) % CLUSTERS, 6).float()
    method = make_method(heads=3, mine_on="backbone")
    method.neighbors.copy_(method.mine_neighbors(features))
    with torch.no_grad():
        for head in method.heads:
            head.weight.zero_(), head.bias.zero_()
        method.heads[0].bias[1] = 20
        method.heads[2].weight.copy_(torch.eye(CLUSTERS, 6))
    method.e_step(features, ("test",))
    assert int(method.best_head) == 2
    shares = torch.bincount(torch.arange(IMAGES) % CLUSTERS).double() / IMAGES
    assert float(method.selection_loss) == pytest.approx(float((shares * shares.log()).sum()), abs=2e-3)
    assert torch.equal(method.cluster_logits(features), method.heads[2](features))


def test_the_loss_that_selects_an_epoch_needs_e_steps():
    options = {"num_images": 9, "num_heads": 1, "num_neighbors": 1, "mine_on": "backbone", "embedding_size": 3}
    with pytest.raises(InputError, match=r"e_step_every_n_epochs=1"):
        SCAN(
            backbone=make_backbone(),
            train_backbone=True,
            entropy_weight=5.0,
            select="lowest_selection_loss",
            e_step_every_n_epochs=0,
            **options,
            **COMMON,
        )


def test_the_networks_of_the_epoch_with_the_lowest_selection_loss_come_back_after_training():
    images = torch.randn(IMAGES, 5)
    method = make_started_method(images, select="lowest_selection_loss")
    method._trainer.datamodule.seed = 0
    method._trainer.precision_plugin = SimpleNamespace(forward_context=nullcontext)
    losses, states = [], []
    for epoch, scale in enumerate([50, 0.1, 0, 50, 60]):  # heads that are sure of themselves disagree with neighbours
        with torch.no_grad():
            for p in [*method.heads.parameters(), *method.backbone.parameters()]:
                p.copy_(scale * torch.randn(p.shape))
        method.backbone[1].running_mean.fill_(epoch)
        states.append(read_networks({n: v.clone() for n, v in method.state_dict().items()}))
        method.e_step(method.encode_all(iter([images]), IMAGES), ("test",))
        losses.append((float(method.selection_loss), int(method.best_head)))
        method._trainer.training = epoch < 4
        method.run_e_step(epoch)
    best = min(range(1, 5), key=lambda epoch: losses[epoch][0])
    assert best in (1, 2) and int(method.best.epoch) == best
    assert float(method.best.lowest_loss) == losses[best][0] == float(method.selection_loss)
    assert int(method.best_head) == losses[best][1]
    for name, value in read_networks(method.state_dict()).items():
        assert torch.equal(value, states[best][name]), name


# Whole runs

RUN = ["method=scan", "dataset=digits", "hardware=cpu", "logger=none", "batch_size=450", "before.batch_size=450"]
RUN += ["trainer.max_epochs=2", "before.trainer.max_epochs=1", "evaluation.kmeans_restarts=1"]
RUN += ["pixel_baseline_max_values=0", "callbacks.checkpoint.min_seconds=0", "callbacks.checkpoint.every_n_steps=1"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Results and folder of a run of both stages."""
    folder = tmp_path_factory.mktemp("scan")
    return run(compose_train(*RUN), folder), folder


def test_second_stage_starts_from_the_first(finished_run):
    results, folder = finished_run
    assert results["earlier"]["run"] == str(folder / "before") and len(results["earlier"]["sha256"]) == 64
    _, pretext = load_method(load_checkpoint(folder / "before"))
    _, clustering = load_method(load_checkpoint(folder))
    assert isinstance(pretext, Pretext) and isinstance(clustering, SCAN)
    for name, value in pretext.projector.state_dict().items():
        assert torch.equal(clustering.projector.state_dict()[name], value)
    assert torch.equal(clustering.neighbors[:, 0], torch.arange(1797))
    others = clustering.neighbors[:, 1:]
    assert others.min() >= 0 and others.max() < 1797 and not (others == torch.arange(1797)[:, None]).any()


def test_a_changed_first_stage_is_refused_when_a_run_is_resumed(finished_run, tmp_path):
    shutil.copytree(finished_run[1], tmp_path / "run")
    shutil.copytree(finished_run[1] / "before", tmp_path / "other")
    checkpoint = load_checkpoint(tmp_path / "other")
    checkpoint["state_dict"]["projector.0.bias"] += 1e-3
    torch.save(checkpoint, tmp_path / "other" / CHECKPOINT)
    (tmp_path / "run" / RESULTS).unlink()
    with pytest.raises(InputError, match=r"earlier\.sha256"):
        run(compose_train(*RUN, f"start={tmp_path / 'other'}"), tmp_path / "run")


SELECT = ["method.select=lowest_selection_loss", "trainer.max_epochs=3", "method.optimizer.lr=0.03"]


class StatesOfEpochs(Callback):
    """Keeps the state and the selection loss of the start of each epoch; stops a run before the epoch `stop`."""

    def __init__(self, stop=None):
        self.states, self.losses, self.stop = [], [], stop

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.stop:
            raise KeyboardInterrupt

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:  # the E-step of the epoch is done
            self.losses.append(float(pl_module.selection_loss) if trainer.current_epoch else math.inf)
            self.states.append({n: v.clone() for n, v in pl_module.state_dict().items()})


def run_with(callback, folder, *overrides, monkeypatch):
    """Run with SELECT, and with a callback more."""

    def build_with_callback(*args):
        trainer = build_trainer(*args)
        trainer.callbacks.insert(0, callback)
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr("deepclust.commands.train.build_trainer", build_with_callback)
        return run(compose_train(*RUN, *SELECT, *overrides), folder)


@pytest.mark.slow
def test_a_resumed_run_selects_the_same_epoch(finished_run, tmp_path, monkeypatch):
    start, epochs = f"start={finished_run[1] / 'before'}", StatesOfEpochs()
    results = run_with(epochs, tmp_path / "whole", start, monkeypatch=monkeypatch)
    final = load_checkpoint(tmp_path / "whole")["state_dict"]
    best_epoch, lowest_loss = int(final["best.epoch"]), float(final["best.lowest_loss"])
    assert best_epoch and lowest_loss <= min(epochs.losses)
    if best_epoch < 3:  # the last epoch has no start of a next one
        assert epochs.losses[best_epoch] == lowest_loss
        expected = epochs.states[best_epoch]
        assert all(torch.equal(value, expected[name]) for name, value in read_networks(final).items())
    with pytest.raises(KeyboardInterrupt):
        run_with(StatesOfEpochs(stop=2), tmp_path / "resumed", start, monkeypatch=monkeypatch)
    resumed_results = run_with(StatesOfEpochs(), tmp_path / "resumed", start, monkeypatch=monkeypatch)
    resumed = load_checkpoint(tmp_path / "resumed")["state_dict"]
    assert all(torch.equal(value, resumed[name]) for name, value in final.items())
    assert results["scores"] == resumed_results["scores"]
