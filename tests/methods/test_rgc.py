"""RGC: its replay buffer, its number of clusters, the graphs that it works on, and what it refuses."""

import json
import logging
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepclust.backbones.identity import Identity
from deepclust.commands import evaluate, export, features, predict
from deepclust.commands.train import run
from deepclust.errors import InputError
from deepclust.methods.rgc import EPOCHS_REPORTED, RGC, QNetwork, compute_cluster_state, compute_silhouette, run_lloyd
from deepclust.nn.schedules import Constant
from deepclust.runs.checkpoint import load_checkpoint, load_method
from tests.conftest import compose_train, compose_verb

SMALL = {"num_neighbors": 3, "max_components": 50, "smoothing_steps": 1, "embedding_size": 6, "activation": "identity"}
SMALL |= {"cluster_weight": 10.0, "num_clusters": "auto", "min_clusters": 2, "max_clusters": 5, "reward": "paper"}
SMALL |= {"epsilon": 0.5, "buffer_size": 3, "q_hidden_size": 8, "q_epochs": 4, "q_lr": 1e-2, "discount": 0.1}
SMALL |= {"kmeans_starts": 3, "kmeans_max_iterations": 100, "kmeans_tolerance": 1e-4}


def draw_graph(num_groups=3, size=20, seed=0):
    """Return features (M, 8), edges (2, E) within groups, and the groups (M,) of the nodes, in random order."""
    random = np.random.default_rng(seed)
    groups = random.permutation(np.repeat(np.arange(num_groups), size))
    vectors = np.eye(8)[groups] + 0.3 * random.standard_normal((len(groups), 8))
    first, second = np.nonzero(np.triu(random.random((len(groups),) * 2) < 0.3, 1) & (groups[:, None] == groups))
    return vectors.astype(np.float32), np.stack([first, second]), groups


def make_method(vectors, edges, **options):
    """Return a method on a graph, and its first state (M, d)."""
    torch.manual_seed(0)
    method = RGC(
        backbone=Identity(in_channels=vectors.shape[1], image_size=1),
        num_images=len(vectors),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        schedule=Constant(),
        **(SMALL | options),
    )
    method._trainer = SimpleNamespace(datamodule=SimpleNamespace(edges=edges))
    return method, encode(method, vectors)


def encode(method, vectors):
    return method.encode_all([torch.from_numpy(vectors)[:, :, None, None]], len(vectors))


@pytest.fixture(scope="module")
def graph_run(tmp_path_factory):
    """The folder and the results of a small run on a graph."""
    folder = tmp_path_factory.mktemp("graph")
    vectors, edges, groups = draw_graph()
    np.savez(folder / "groups.npz", features=vectors, edges=edges, labels=groups)
    cfg = compose_train(
        *("method=rgc", "dataset=graph", f"dataset.path={folder}/groups.npz", "dataset.name=null", "hardware=cpu"),
        *("trainer.max_epochs=6", "method.buffer_size=2", "method.max_clusters=5", "method.embedding_size=16"),
        *("report.map_points=10", "evaluation.kmeans_restarts=1"),
    )
    (folder / "run").mkdir()
    return folder / "run", run(cfg, folder / "run")


def test_the_q_network_learns_from_states_as_they_were():
    """Against a replay buffer of the states themselves, and an optimiser that lives through all rounds."""
    vectors, edges, _ = draw_graph()
    method, _ = make_method(vectors, edges)
    state = encode(method.double(), vectors)
    method.explores = True
    network = QNetwork(6, 8, 4).double()
    network.load_state_dict(method.q_network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    buffer, last, num_rounds = [], None, 0
    for epoch in range(8):
        known = method.assignments.clone()  # of the last epoch
        method.e_step(state, ("test", epoch))
        first_means = method.past_means[0, : method.past_mean_counts[0]].clone()
        means = compute_cluster_state(state, known) if epoch else first_means
        if last is not None:  # its transition has ended
            buffer.append((*last, (state, means)))
        if len(buffer) == 3:
            for _ in range(4):
                losses = [(r + 0.1 * network(*after).max() - network(*now)[k]) ** 2 for now, k, r, after in buffer]
                optimizer.zero_grad()
                torch.stack(losses).mean().backward()
                optimizer.step()
            buffer, num_rounds = [], num_rounds + 1
        for p, expected in zip(method.q_network.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(p, expected, rtol=1e-7, atol=1e-10)
        last = (state, means), method.num_clusters - 2, method.reward_of_epoch.clone()
        with torch.no_grad():  # what a step of the encoder does
            for p in method.encoder.parameters():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(epoch)).to(p)
        state = encode(method, vectors)
    assert num_rounds == 2


def test_a_run_on_a_graph_finds_its_groups_and_everything_takes_their_number_from_the_state(graph_run, capsys):
    folder, results = graph_run
    assert results["dataset"] == "groups" and 2 <= results["num_clusters"] <= 5
    assert results["scores"]["method"]["nmi"] > 0.6
    assert f"{results['num_clusters']} clusters" in (folder / "report.html").read_text()
    cfg, method = load_method(load_checkpoint(folder))
    assert cfg.dataset.num_clusters == "auto" and method.num_clusters == results["num_clusters"]
    evaluate.main(compose_verb("evaluate", f"run={folder}", "accelerator=cpu"))
    assert json.loads(capsys.readouterr().out)["scores"] == results["scores"]


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        (predict, ["images={folder}/new.npy", "output={folder}/new.csv"]),
        (features, ["output={folder}/kept", "accelerator=cpu"]),
        *((export, [f"format={form}", "output={folder}/program"]) for form in ("torchscript", "hub")),
    ],
    ids=["predict", "features", "export", "hub"],
)
def test_what_needs_a_rule_for_new_images_is_refused(graph_run, tmp_path, verb, arguments):
    folder, _ = graph_run
    np.save(tmp_path / "new.npy", draw_graph(seed=1)[0])
    name = verb.__name__.rpartition(".")[2]
    cfg = compose_verb(name, f"run={folder}", *(argument.format(folder=tmp_path) for argument in arguments))
    with pytest.raises(InputError, match="RGC clusters the images that it was trained on and has no rule for new ones"):
        verb.main(cfg)
    assert [path.name for path in tmp_path.iterdir()] == ["new.npy"]


def test_other_images_than_those_of_the_graph_are_refused():
    vectors, edges, _ = draw_graph()
    method, state = make_method(vectors, edges)
    method.e_step(state, ("test",))
    assert torch.equal(encode(method, vectors), state)
    for others in (vectors[::-1].copy(), vectors[:-1], draw_graph(seed=1)[0]):
        with pytest.raises(InputError, match="other images"):
            encode(method, others)


def test_a_data_set_with_test_images_is_refused(tmp_path):
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}_features.npy", draw_graph()[0])
    cfg = compose_train("method=rgc", "dataset=features", f"dataset.path={tmp_path}", "hardware=cpu")
    with pytest.raises(InputError, match=r"evaluates other images .* RGC"):
        run(cfg, tmp_path / "run")


def test_vectors_are_joined_to_their_nearest_and_reduced_to_principal_components():
    vectors, _, groups = draw_graph()
    method, state = make_method(vectors, None, max_components=4, smoothing_steps=2)
    assert method.node_features.shape == (60, 4) and state.shape == (60, 6)
    raw = make_method(vectors, None, max_components=4, smoothing_steps=0)[0].node_features
    spreads = [
        sum(float(features[groups == g].var(0).sum()) for g in range(3)) / float(features.var(0).sum())
        for features in (method.node_features, raw)
    ]
    assert spreads[0] < spreads[1]  # within groups, in relation to all


def test_chance_chooses_in_training_only_and_a_given_number_is_kept():
    vectors, edges, _ = draw_graph()
    method, state = make_method(vectors, edges, epsilon=0.0)
    for epoch in range(3):
        means = compute_cluster_state(state, method.assignments)
        method.e_step(state, ("test", epoch))
        if epoch:  # before, the assignments of the state are those of a first k-means
            assert method.num_clusters == 2 + int(method.q_network(state, means).argmax())
    assert bool((method.chosen_by_q[:3] > 0).all()) and method.num_e_steps == 3
    method.explores = True
    method.e_step(state, ("test", 3))
    assert method.chosen_by_q[3] == 0
    method, state = make_method(vectors, edges, num_clusters=4)
    method.e_step(state, ("test",))
    assert method.num_clusters == 4 and method.cluster_logits(state).shape == (60, 4)


def test_the_last_choice_is_compared_with_those_before_and_with_the_silhouette(caplog):
    vectors, edges, _ = draw_graph()
    method, state = make_method(vectors, edges)
    method.num_clusters = 3
    method.chosen_by_q[:5] = torch.tensor([3, 0, 5, 3, 0])  # 0: chance has chosen
    with caplog.at_level(logging.INFO):
        method.report_choice(state, ("test",))
    assert "has found 3 clusters, as in 67% of the last choices" in caplog.text
    silhouettes = {k: compute_silhouette(state, method.run_kmeans(state, k, ("test",))[0]) for k in (2, 3, 4, 5)}
    assert f"would be {max(silhouettes, key=silhouettes.get)}" in caplog.text


@pytest.mark.parametrize(("num_e_steps", "place"), [(1, 0), (3, 2), (EPOCHS_REPORTED, EPOCHS_REPORTED - 1), (102, 1)])
def test_who_has_chosen_the_number_of_clusters_is_logged(num_e_steps, place, monkeypatch):
    vectors, edges, _ = draw_graph()
    method, _ = make_method(vectors, edges)
    method._trainer.current_epoch, method.e_step_every_n_epochs, logged = 1, 0, {}
    monkeypatch.setattr(method, "log", lambda name, value: logged.update({name: float(value)}))
    method.num_e_steps.fill_(num_e_steps)
    method.reward_of_epoch.fill_(0.5)
    method.num_clusters = 4
    for chosen in (0, 4):
        method.chosen_by_q[place] = chosen
        method.on_train_epoch_start()
        assert logged == {"train/num_clusters": 4, "train/reward": 0.5, "train/greedy": float(chosen == 4)}


def test_the_state_comes_back_with_its_clusters():
    vectors, edges, _ = draw_graph()
    method, state = make_method(vectors, edges)
    method.e_step(state, ("test",))
    loaded, _ = make_method(vectors, edges)
    loaded.load_state_dict(method.state_dict())
    assert loaded.num_clusters == method.num_clusters > 1
    assert torch.equal(encode(loaded, vectors), state)
    assert torch.equal(loaded.cluster_logits(state), method.cluster_logits(state))


def test_a_cluster_without_rows_takes_the_farthest_row():
    rows = torch.tensor([[0.0], [0.1], [0.2], [9.0]])
    assignments, centroids = run_lloyd(rows, torch.tensor([[0.0], [50.0]]), max_iterations=10, tolerance=1e-4)
    assert assignments.tolist() == [0, 0, 0, 1] and centroids.flatten().tolist() == pytest.approx([0.1, 9.0])


@pytest.mark.parametrize("rows", [torch.ones(5, 2), torch.zeros(5, 2)], ids=["equal", "zero"])
@pytest.mark.parametrize("reward", ["silhouette", "paper"])
def test_degenerate_rows_give_clusters(rows, reward):
    method, state = make_method(rows.numpy(), None, reward=reward)
    for epoch in range(5):
        method.e_step(state, ("test", epoch))
    logits = method.cluster_logits(state)
    assert logits.shape == (5, method.num_clusters) and bool(logits.isfinite().all())
    method.check_weights_are_finite()


def test_numbers_of_clusters_that_cannot_be_are_refused():
    vectors, edges, _ = draw_graph()
    with pytest.raises(InputError, match=r"method\.min_clusters is 6, method\.max_clusters 5"):
        make_method(vectors, edges, min_clusters=6)
    assert make_method(vectors[:3], edges[:, :0])[0].max_clusters == 3
