"""Scores against scikit-learn and hand-worked tables, for samples in any batches, order and processes."""

import copy
import doctest
import pickle
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from torchmetrics import MetricCollection

from deepclust import metrics
from deepclust.errors import InputError
from deepclust.metrics import (
    AdjustedRandIndex,
    ClusteringAccuracy,
    ClusteringScores,
    ContingencyTable,
    NormalizedMutualInformation,
    cluster_health,
    compute_scores,
    match_clusters_to_classes,
)
from tests.processes import run_on_processes

SCORES = ("acc", "purity", "nmi", "ari", "ami")


def score(assignments, labels, num_clusters, num_classes, batches=1):
    """Update the metric batch by batch and return what it computes, and what its table says."""
    metric = ClusteringScores(num_clusters=num_clusters, num_classes=num_classes)
    assignments, labels = torch.as_tensor(assignments), torch.as_tensor(labels)
    for batch in zip(assignments.chunk(batches), labels.chunk(batches), strict=True):
        metric.update(*batch)
    return describe(metric)


def describe(metric):
    """Return what a metric computes as numbers, None for nan, and what its table says, of all processes."""
    scores = {name: None if score.isnan() else score.item() for name, score in metric.compute().items()}
    with metric.sync_context():
        table = metric.table.clone()
    return {
        **scores,
        "mapping": match_clusters_to_classes(table[:-1]).tolist(),
        "sizes": table.sum(0).tolist(),
        "num_unlabelled": int(table[-1].sum()),
    }


@st.composite
def samples(draw):
    num_clusters, num_classes, size = draw(st.integers(1, 7)), draw(st.integers(1, 5)), draw(st.integers(1, 50))
    assignments = draw(st.lists(st.integers(0, num_clusters - 1), min_size=size, max_size=size))
    labels = draw(st.lists(st.integers(-1, num_classes - 1), min_size=size, max_size=size))
    return assignments, labels, num_clusters, num_classes


@settings(max_examples=80, deadline=None)
@given(samples())
def test_scores_equal_scikit_learn_and_brute_force(drawn):
    assignments, labels, num_clusters, num_classes = drawn
    result = score(*drawn)
    known = [(a, b) for a, b in zip(assignments, labels, strict=True) if b >= 0]
    assert result["num_unlabelled"] == len(labels) - len(known)
    assert result["sizes"] == np.bincount(assignments, minlength=num_clusters).tolist()
    if not known:
        assert all(result[name] is None for name in SCORES)
        return
    a, b = map(list, zip(*known, strict=True))
    assert result["nmi"] == pytest.approx(reference.normalized_mutual_info_score(b, a), abs=1e-9)
    assert result["ari"] == pytest.approx(reference.adjusted_rand_score(b, a), abs=1e-9)
    assert result["ami"] == pytest.approx(reference.adjusted_mutual_info_score(b, a), abs=1e-9)
    slots = range(max(num_clusters, num_classes))
    best = max(sum(a_i == order[b_i] for a_i, b_i in known) for order in permutations(slots, num_classes))
    assert result["acc"] == best / len(known)
    assert sum(result["mapping"][a_i] == b_i for a_i, b_i in known) == best
    matched = [label for label in result["mapping"] if label >= 0]
    assert len(set(matched)) == len(matched) == min(num_clusters, num_classes)
    majorities = [max((b.count(label) for label in set(b)), default=0) for b in _labels_by_cluster(known)]
    assert result["purity"] == sum(majorities) / len(known)


def _labels_by_cluster(known):
    return [[b for a, b in known if a == cluster] for cluster in {a for a, _ in known}]


@settings(max_examples=30, deadline=None)
@given(samples(), st.integers(2, 5), st.randoms(use_true_random=False))
def test_batches_and_numbering_of_clusters_do_not_matter(drawn, batches, random):
    assignments, labels, num_clusters, num_classes = drawn
    whole = score(*drawn)
    assert score(*drawn, batches=min(batches, len(labels))) == whole
    new_ids = random.sample(range(num_clusters), num_clusters)
    renumbered = score([new_ids[a] for a in assignments], labels, num_clusters, num_classes)
    for name in SCORES:
        expected = None if whole[name] is None else pytest.approx(whole[name], abs=1e-12)
        assert renumbered[name] == expected


def test_more_clusters_than_classes_by_hand():
    table = torch.tensor([[3, 1, 0], [0, 0, 2]])
    scores = compute_scores(table)
    assert scores["acc"] == 5 / 6
    assert scores["purity"] == 1
    assert match_clusters_to_classes(table).tolist() == [0, -1, 1]


def test_recall_of_the_smallest_third_of_the_classes_by_hand():
    table = torch.tensor([[9, 0, 1], [0, 0, 0], [2, 2, 0], [3, 0, 3]])  # cluster 1 is class 2's, cluster 2 class 3's
    assert metrics.smallest_classes_recall(table) == 2 / 4, "one of three classes with samples, that of 4"
    unmatched = torch.tensor([[9, 0], [0, 5], [1, 0]])
    assert metrics.smallest_classes_recall(unmatched) == 0
    six = torch.tensor([[6, 0, 0, 0, 0, 0], [0, 5, 1, 0, 0, 0], [0, 0, 3, 0, 0, 1], [9, 0, 0, 3, 0, 0]])
    six = torch.cat([six, torch.tensor([[0, 0, 0, 0, 4, 0], [0, 0, 0, 0, 1, 9]])])
    assert metrics.smallest_classes_recall(six) == (3 / 4 + 4 / 4) / 2
    assert metrics.smallest_classes_recall(torch.zeros(2, 3, dtype=torch.int64)) is None


def test_over_clustering_counts_every_cluster():
    table = torch.tensor([[5, 0, 3, 1], [0, 4, 1, 2]])  # clusters 0 and 1 are matched, 2 and 3 join classes 0 and 1
    assert metrics.overclustering_accuracy(table) == 14 / 16
    forced = torch.tensor([[5, 4], [1, 2]])  # a matched cluster keeps its class, although it holds more of the other
    assert metrics.overclustering_accuracy(forced) == metrics.compute_scores(forced)["acc"] == 7 / 12
    empty_clusters = torch.tensor([[5, 4, 0, 0], [1, 2, 0, 0]])  # so that there are no more clusters than classes
    assert metrics.overclustering_accuracy(empty_clusters) == 7 / 12
    empty_class = torch.tensor([[0, 0, 0], [5, 4, 1], [1, 2, 6]])  # cluster 1 is left over and joins class 1
    assert metrics.overclustering_accuracy(empty_class) == 15 / 19
    assert metrics.overclustering_accuracy(torch.zeros(2, 3, dtype=torch.int64)) is None
    assert metrics.overclustering_accuracy(torch.zeros(0, 3, dtype=torch.int64)) is None


def test_fewer_clusters_than_classes_by_hand():
    table = torch.tensor([[4, 0], [2, 1], [0, 3]])
    scores = compute_scores(table)
    assert scores["acc"] == 7 / 10
    assert scores["purity"] == 7 / 10
    assert match_clusters_to_classes(table).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([[6]], {"acc": 1, "purity": 1, "nmi": 1, "ari": 1, "ami": 1}),
        ([[3, 0], [0, 4]], {"acc": 1, "purity": 1, "nmi": 1, "ari": 1, "ami": 1}),
        ([[3, 0], [4, 0]], {"acc": 4 / 7, "purity": 4 / 7, "nmi": 0, "ari": 0, "ami": 0}),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], {"acc": 1, "purity": 1, "nmi": 1, "ari": 1, "ami": 1}),
        ([[1, 1], [1, 1]], {"acc": 0.5, "purity": 0.5, "nmi": 0, "ari": -0.5, "ami": -0.5}),
    ],
    ids=["one of each", "perfect", "collapsed", "single samples", "independent"],
)
def test_extreme_tables(table, expected):
    assert compute_scores(torch.tensor(table)) == pytest.approx(expected, abs=1e-12)


def test_without_labels_there_are_no_scores():
    result = score([0, 2, 2], [-1, -1, -1], 3, 0)
    assert all(result[name] is None for name in SCORES)
    assert result["mapping"] == [-1, -1, -1]
    assert result["sizes"] == [1, 0, 2] and result["num_unlabelled"] == 3


def test_exact_at_imagenet_size():
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 50, 1_300_000)
    assignments = np.where(generator.random(len(labels)) < 0.6, labels, generator.integers(0, 60, len(labels)))
    result = score(assignments, labels, 60, 50, batches=3)
    assert result["ari"] == pytest.approx(reference.adjusted_rand_score(labels, assignments), rel=1e-9)
    assert result["nmi"] == pytest.approx(reference.normalized_mutual_info_score(labels, assignments), rel=1e-9)
    collapsed = score(np.zeros(len(labels), int), labels, 60, 50)
    assert collapsed["ari"] == 0 and collapsed["nmi"] == 0 and collapsed["ami"] == 0


def test_a_thousand_classes_and_clusters():
    counts = np.random.default_rng(0).poisson(1.3, (1000, 1000)) + 500 * np.eye(1000, dtype=np.int64)
    entropies = [-(p * np.log(p)).sum() for p in (counts.sum(0) / counts.sum(), counts.sum(1) / counts.sum())]
    information = reference.mutual_info_score(None, None, contingency=counts)
    expected = 0.3182050043  # by sklearn.metrics.cluster.expected_mutual_information, in ten minutes
    ami = (information - expected) / (np.mean(entropies) - expected)
    assert compute_scores(torch.from_numpy(counts))["ami"] == pytest.approx(ami, abs=1e-9)


@pytest.mark.parametrize(("assignments", "labels"), [([0, 3], [0, 0]), ([0, -1], [0, 0]), ([0, 1], [0, 1])])
def test_ids_out_of_range_are_refused(assignments, labels):
    with pytest.raises(InputError, match=r"sample 1 .* labels below 1 and clusters from 0 to 2"):
        score(assignments, labels, 3, 1)


def _score_on_process(rank, edges):
    """Return the scores on process `rank`, which has samples edges[rank] to edges[rank + 1]."""
    rows = torch.arange(edges[rank], edges[rank + 1])
    metric = ClusteringScores(num_clusters=4, num_classes=3)
    if len(rows) > 0:
        metric.update(rows * 7 % 4, rows * 5 % 4 - 1)
    return describe(metric)


@pytest.mark.parametrize("edges", [[0, 3, 10], [0, 3, 3, 10]], ids=["2 processes", "3 processes, one without samples"])
def test_processes_add_up(edges, tmp_path):
    rows = torch.arange(10)
    whole = score(rows * 7 % 4, rows * 5 % 4 - 1, 4, 3)
    assert whole["num_unlabelled"] > 0
    assert all(result == whole for result in run_on_processes(_score_on_process, len(edges) - 1, tmp_path, edges))


def test_health():
    assert cluster_health(torch.tensor([5, 5])) == {"cluster_size_entropy": pytest.approx(1), "empty_clusters": 0}
    assert cluster_health(torch.tensor([10, 0, 0])) == {"cluster_size_entropy": 0, "empty_clusters": 2}
    assert cluster_health(torch.tensor([4])) == {"cluster_size_entropy": 1, "empty_clusters": 0}
    assert cluster_health(torch.tensor([0, 0])) == {"cluster_size_entropy": 0, "empty_clusters": 2}
    uneven = cluster_health(torch.tensor([8, 8, 16, 0]))["cluster_size_entropy"]
    assert uneven == pytest.approx((0.5 * 2 + 0.5) / 2)  # in bits: two quarters and a half, over log2 of 4


PREDS = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0, 3, 3, 1, 0])
TARGET = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2, -1, 1, -3])
SIZES = {"num_clusters": 4, "num_classes": 3}
SINGLE_SCORES = {"acc": ClusteringAccuracy, "nmi": NormalizedMutualInformation, "ari": AdjustedRandIndex}
SCORE_CLASSES = [*SINGLE_SCORES.values(), ClusteringScores]
BY_SCIKIT_LEARN = {
    "nmi": reference.normalized_mutual_info_score,
    "ari": reference.adjusted_rand_score,
    "acc": lambda labels, ids: max(
        np.mean([order[b] == a for a, b in zip(ids, labels, strict=True)]) for order in permutations(range(4), 3)
    ),
}


def to_numbers(result):
    return {name: score.item() for name, score in result.items()} if isinstance(result, dict) else result.item()


def known(preds, target):
    return target[target >= 0].numpy(), preds[target >= 0].numpy()


@pytest.mark.parametrize("batch_size", [1, 5, 12])
@pytest.mark.parametrize("name", SINGLE_SCORES)
def test_a_score_in_one_batch_and_in_many_and_of_each_batch(name, batch_size):
    metric = SINGLE_SCORES[name](**SIZES)
    for preds, target in zip(PREDS.split(batch_size), TARGET.split(batch_size), strict=True):
        of_batch = metric(preds, target)  # forward: the score of this batch, and all of them go on adding up
        labels, ids = known(preds, target)
        assert (
            of_batch.isnan() if len(ids) == 0 else of_batch.item() == pytest.approx(BY_SCIKIT_LEARN[name](labels, ids))
        )
    result = metric.compute()
    assert result.shape == () and result.is_floating_point()
    assert result.item() == pytest.approx(BY_SCIKIT_LEARN[name](*known(PREDS, TARGET)), abs=1e-12)
    assert result == ClusteringScores(**SIZES)(PREDS, TARGET)[name]


@pytest.mark.parametrize("kind", SCORE_CLASSES)
def test_a_score_is_an_ordinary_metric(kind, tmp_path):
    assert kind.higher_is_better is True and kind.is_differentiable is False and kind.full_state_update is False
    metric = kind(**SIZES)
    metric.update(PREDS[:7], TARGET[:7])
    copies = [metric.clone(), pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)]
    part, rest = to_numbers(metric.compute()), (PREDS[7:], TARGET[7:])
    metric.update(*rest)
    whole = to_numbers(metric.compute())
    for other in copies:
        assert to_numbers(other.compute()) == part != whole
        other.update(*rest)
        assert to_numbers(other.compute()) == whole
    metric.reset()
    assert metric.table.sum() == 0
    metric.update(preds=PREDS[:7], target=TARGET[:7])
    assert to_numbers(metric.compute()) == part
    other = kind(**SIZES)
    other.update(*rest)
    other.merge_state(metric)
    assert to_numbers(other.compute()) == whole

    metric.persistent(True)
    torch.save(metric.state_dict(), tmp_path / "metric.pt")
    loaded = kind(**SIZES)
    loaded.persistent(True)
    loaded.load_state_dict(torch.load(tmp_path / "metric.pt"))
    assert torch.equal(loaded.table, metric.table)
    assert metric.to("meta").table.device.type == "meta"


@pytest.mark.parametrize("kind", SCORE_CLASSES)
def test_counts_stay_whole_numbers_and_ids_may_have_any_integer_type(kind):
    metric = kind(**SIZES).half().set_dtype(torch.float16).to(torch.bfloat16)
    assert metric.table.dtype == torch.int64
    metric.update(torch.zeros(70_000, dtype=torch.uint8), torch.zeros(70_000, dtype=torch.int8))
    assert metric.table[0, 0] == 70_000


@pytest.mark.parametrize("kind", SCORE_CLASSES)
@pytest.mark.parametrize(
    ("preds", "target"),
    [
        (PREDS.half(), TARGET),
        (PREDS, TARGET.float()),
        (torch.rand(12, 4), TARGET),
        (PREDS > 1, TARGET),
        (PREDS, TARGET[:5]),
        (PREDS, TARGET[:1]),
        (PREDS[0], TARGET[0]),
        (PREDS.view(3, 4), TARGET.view(3, 4)),
        (PREDS + 2, TARGET),
        (PREDS - 1, TARGET),
        (PREDS, TARGET + 1),
    ],
)
def test_what_is_no_ids_is_refused_and_counts_nothing(kind, preds, target):
    metric = kind(**SIZES)
    with pytest.raises(InputError):
        metric.update(preds, target)
    assert metric.table.sum() == 0


@pytest.mark.parametrize("value", [-1, 2.0, True, "3", None])
@pytest.mark.parametrize("name", SIZES)
def test_numbers_of_clusters_and_classes_are_whole_numbers(name, value):
    with pytest.raises(InputError, match=name):
        ClusteringAccuracy(**{**SIZES, name: value})


def test_a_collection_counts_once(monkeypatch):
    calls = []
    count = ContingencyTable.update
    monkeypatch.setattr(
        ContingencyTable, "update", lambda self, *a, **b: calls.append(type(self)) or count(self, *a, **b)
    )
    collection = MetricCollection([kind(**SIZES) for kind in SCORE_CLASSES], prefix="val/")
    for preds, target in zip(PREDS.split(5), TARGET.split(5), strict=True):
        collection.update(preds, target)
    assert len(calls) == len(SCORE_CLASSES) + 2  # the first batch shows that they have one table
    assert len(collection.compute_groups) == 1
    result = to_numbers(collection.compute())
    joint = to_numbers(ClusteringScores(**SIZES)(PREDS, TARGET))
    assert result == {
        "val/ClusteringAccuracy": joint["acc"],
        "val/NormalizedMutualInformation": joint["nmi"],
        "val/AdjustedRandIndex": joint["ari"],
        **{f"val/{name}": score for name, score in joint.items()},
    }
    collection.reset()
    assert all(metric.table.sum() == 0 for metric in collection.values())
    restored = pickle.loads(pickle.dumps(collection))
    for metrics_ in (restored, collection.clone(prefix="test/")):
        metrics_.update(PREDS, TARGET)
        assert {name.partition("/")[2]: score for name, score in to_numbers(metrics_.compute()).items()} == {
            name.partition("/")[2]: score for name, score in result.items()
        }


def _collect_on_process(rank, share):
    """Return what a collection, and each metric alone, says on a process that has every `share`-th sample."""
    collection = MetricCollection([kind(**SIZES) for kind in SCORE_CLASSES])
    alone = ClusteringAccuracy(**SIZES)
    for metric in (collection, alone):
        metric.update(PREDS[rank::share], TARGET[rank::share])
    results = [{**to_numbers(collection.compute()), "alone": alone.compute().item()}]
    collection.update(PREDS[:2], TARGET[:2])  # what was gathered must not be counted again
    results.append({**to_numbers(collection.compute()), "table": int(alone.table.sum())})
    return results


def test_two_processes_add_up_and_go_on(tmp_path):
    first, second = MetricCollection([kind(**SIZES) for kind in SCORE_CLASSES]), None
    first.update(PREDS, TARGET)
    second = first.clone()
    second.update(PREDS[:2].repeat(2), TARGET[:2].repeat(2))
    expected = [to_numbers(first.compute()), to_numbers(second.compute())]
    for results in run_on_processes(_collect_on_process, 2, tmp_path, 2):
        assert results == [{**expected[0], "alone": expected[0]["ClusteringAccuracy"]}, {**expected[1], "table": 6}]


def test_in_anybody_s_lightning_module(tmp_path):
    from lightning import LightningModule, Trainer  # not above: the processes of other tests need not wait for it

    class OwnModule(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.accuracy = ClusteringAccuracy(**SIZES)
            self.scores = ClusteringScores(**SIZES)

        def training_step(self, batch, _):
            return self.layer(batch[0].float()[:, None]).mean()

        def validation_step(self, batch, _):
            self.accuracy(*batch)
            self.log("val/accuracy", self.accuracy)
            self.scores.update(*batch)

        def on_validation_epoch_end(self):
            self.log_dict(self.scores.compute())
            self.scores.reset()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(PREDS, TARGET), batch_size=5)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, **quiet)
    trainer.fit(OwnModule(), batches, batches)
    joint = to_numbers(ClusteringScores(**SIZES)(PREDS, TARGET))
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert logged == pytest.approx({"val/accuracy": joint["acc"], **joint})


@pytest.mark.parametrize("kind", SCORE_CLASSES)
def test_a_plot(kind):
    import matplotlib.pyplot as plt

    metric = kind(**SIZES)
    values = [metric(PREDS[:n], TARGET[:n]) for n in (8, 10, 12)]
    for figure, axes in (metric.plot(), metric.plot(values)):
        assert axes is not None
        plt.close(figure)


def test_a_plot_has_the_range_of_the_score():
    ranges = {name: (kind.plot_lower_bound, kind.plot_upper_bound) for name, kind in SINGLE_SCORES.items()}
    assert ranges == {"acc": (0, 1), "nmi": (0, 1), "ari": (-0.5, 1)}


def test_examples_of_the_docstrings():
    results = doctest.testmod(metrics)
    assert results.failed == 0 and results.attempted >= 15
