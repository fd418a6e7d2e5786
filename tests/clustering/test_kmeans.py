"""k-means against plain loops in float64, its invariances, and inputs at the edge."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch.nn.functional import normalize

from deepclust.clustering import kmeans as module
from deepclust.clustering.kmeans import (
    _Data,
    _sums,
    _sums_by_products,
    best_of,
    kmeans,
    lloyd,
    nearest,
    seed_kmeans_plus_plus,
)
from deepclust.errors import InputError

METRICS = ("cosine", "euclidean")
SETTINGS = {"max_iterations": 300, "tolerance": 1e-4}
KEY = (0, "test")


def blobs(size, features, clusters, *, noise=1.0, seed=0, dtype=torch.float32):
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, features, generator=draws)
    rows = centres[torch.randint(clusters, (size,), generator=draws)]
    return (rows + noise * torch.randn(size, features, generator=draws)).to(dtype)


def unit(row):
    length = math.sqrt(float(row @ row))
    return row / length if length > 0 else row


def distance(row, centroid, metric):
    return 1 - float(unit(row) @ unit(centroid)) if metric == "cosine" else float(((row - centroid) ** 2).sum())


def slow_nearest(rows, centroids, metric):
    distances = [[distance(row, centroid, metric) for centroid in centroids] for row in rows]
    ids = [min(range(len(d)), key=lambda k: d[k] > min(d) + 1e-11) for d in distances]
    return ids, [d[k] for d, k in zip(distances, ids, strict=True)]


def slow_lloyd(rows, centroids, metric, *, max_iterations, tolerance):
    """(assignments, centroids, inertia, iterations) by the order of steps that the module states."""
    rows = np.array([unit(row) for row in rows]) if metric == "cosine" else rows
    limit = tolerance * rows.var(axis=0, ddof=1).mean() if len(rows) > 1 else 0
    assignments, distances = slow_nearest(rows, centroids, metric)
    best = None
    for iteration in range(1, max_iterations + 1):  # noqa: B007
        old, centroids = centroids, np.zeros_like(centroids)
        for k in range(len(centroids)):
            members = rows[[a == k for a in assignments]]
            if len(members) > 0:
                centroids[k] = members.mean(axis=0)
            elif metric == "euclidean":
                centroids[k] = old[k]
        if metric == "euclidean":
            own = [distance(row, centroids[a], metric) for row, a in zip(rows, assignments, strict=True)]
            far = sorted(range(len(rows)), key=lambda i: -own[i])
            ranked = [own[i] for i in far[: len(centroids) + 1]]
            assume(set(assignments) == set(range(len(centroids))) or min(-np.diff(ranked)) > 1e-9)
            for k in range(len(centroids)):
                if k not in assignments and far and own[far[0]] > 0:
                    centroids[k] = rows[far.pop(0)]
        renewed, distances = slow_nearest(rows, centroids, metric)
        if best is None or sum(distances) < best[2] - 1e-12:
            best = renewed, centroids, sum(distances)
        shift = sum(distance(a, b, metric) for a, b in zip(old, centroids, strict=True))
        repeated, assignments = renewed == assignments, renewed
        if repeated or shift <= limit:
            break
    return *best, iteration


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(METRICS), st.integers(2, 40), st.integers(1, 5), st.integers(1, 8), st.integers(0, 10**6))
def test_lloyd_equals_plain_loops(metric, size, features, clusters, seed):
    drawn = np.random.default_rng(seed)
    rows = drawn.normal(size=(size, features)) + drawn.normal(size=features)
    centroids = 2 * drawn.normal(size=(clusters, features))  # some win no row
    found = lloyd(torch.from_numpy(rows), torch.from_numpy(centroids), metric=metric, **SETTINGS)
    assignments, means, inertia, iterations = slow_lloyd(rows, centroids, metric, **SETTINGS)
    assert found.assignments.tolist() == assignments
    np.testing.assert_allclose(found.centroids.numpy(), means, atol=1e-12)
    assert found.inertia == pytest.approx(inertia, rel=1e-6, abs=1e-9)
    assert found.iterations == iterations


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(METRICS), st.integers(1, 30), st.integers(1, 15), st.integers(0, 10**6))
@example("cosine", 14, 11, 13017)  # a tie when hardly any distance is left
def test_seeding_equals_plain_loops(metric, size, clusters, seed):
    drawn = np.random.default_rng(seed)
    rows = drawn.normal(size=(size, 3))
    first, uniforms = drawn.integers(0, size, 2), drawn.random((2, clusters - 1, 3))
    found = seed_kmeans_plus_plus(
        torch.from_numpy(rows), torch.from_numpy(first), torch.from_numpy(uniforms), metric=metric
    )
    for restart in range(2):
        chosen = [first[restart]]
        potential = np.array([distance(row, rows[chosen[0]], metric) for row in rows])
        for draw in uniforms[restart][: max(size - 1, 0)]:
            potential[chosen] = 0
            reached = np.searchsorted(potential.cumsum(), draw * potential.sum())
            left = [
                [min(p, distance(r, rows[c], metric)) for p, r in zip(potential, rows, strict=True)] for c in reached
            ]
            totals = np.sum(left, axis=1)
            best = (totals < totals.min() + 1e-12).argmax()  # two that are nearest to each other tie: the first
            chosen.append(reached[best])
            potential = np.array(left[best])
        assert found[restart, : len(chosen)].tolist() == chosen


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_sums_are_the_same_by_products(size, clusters, restarts, seed):
    drawn = torch.Generator().manual_seed(seed)
    data = _Data(torch.randn(size, 3, generator=drawn), "euclidean")
    assignments = torch.randint(clusters, (restarts, size), generator=drawn)
    (sums, counts), (others, numbers) = (
        sum_up(data, assignments, clusters)
        for sum_up in (_sums, _sums_by_products)  # a CPU's, a GPU's
    )
    torch.testing.assert_close(others, sums, rtol=0, atol=1e-9)
    assert torch.equal(numbers, counts)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_equals_plain_loops_over_several_chunks(metric, dtype):
    rows, centroids = blobs(600, 3, 5, dtype=dtype), blobs(1500, 3, 5, seed=1, dtype=dtype)
    ids, distances = nearest(rows, centroids, metric=metric)
    expected = torch.stack([distances_to(rows, centroid, metric) for centroid in centroids], 1)
    assert torch.equal(ids, expected.argmin(1))
    torch.testing.assert_close(distances, expected.amin(1).to(dtype), rtol=1e-4, atol=1e-6)


def distances_to(rows, centroid, metric):
    rows, centroid = rows.double(), centroid.double()
    if metric == "cosine":
        return 1 - (normalize(rows.float() if rows.dtype == torch.float32 else rows, dim=1) * unit(centroid)).sum(1)
    return (rows - centroid).square().sum(1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clusters", range(2, 20))
def test_equal_centroids_leave_all_to_the_lowest(metric, dtype, clusters):
    rows = blobs(300, 33, 3, dtype=dtype)
    ids, _ = nearest(rows, rows[:1].expand(clusters, -1), metric=metric)
    assert ids.eq(0).all()
    ids, _ = nearest(rows, torch.cat([rows[1:2], rows[:1], rows[1:2], rows[:1]]), metric=metric)
    assert ids.max() == 1


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_of_parts_is_the_best_of_all(metric):
    rows = blobs(700, 20, 6)
    for clusters in (1, 3, 7):
        settings = {"num_clusters": clusters, "metric": metric, "key": KEY, **SETTINGS}
        whole = kmeans(rows, restarts=range(10), **settings)
        single = [kmeans(rows, restarts=[restart], **settings) for restart in range(10)]
        halves = [kmeans(rows, restarts=part, **settings) for part in ([8, 4, 0, 2, 6], [1, 9, 3, 5, 7])]
        for parts in (single, halves):
            best = best_of(parts)
            assert (best.inertia, best.restart, best.iterations) == (whole.inertia, whole.restart, whole.iterations)
            assert torch.equal(best.assignments, whole.assignments) and torch.equal(best.centroids, whole.centroids)
        assert whole.inertia == min(result.inertia for result in single)


@pytest.mark.parametrize("metric", METRICS)
def test_all_restarts_at_a_time_as_on_a_gpu_give_what_each_alone_gives(metric, monkeypatch):
    rows = torch.cat([blobs(300, 4, 5), blobs(100, 4, 1).round()])  # the last ones are near several centroids at once
    rows = torch.cat([rows, rows[:50]])
    told = {"num_clusters": 5, "metric": metric, "restarts": range(6), "key": KEY, **SETTINGS}
    acquire_run_lock = kmeans(rows, **told)
    monkeypatch.setattr(module, "_together", lambda restarts: [slice(0, len(restarts))])
    together = kmeans(rows, **told)
    assert together.assignments.equal(acquire_run_lock.assignments) and together.restart == acquire_run_lock.restart
    torch.testing.assert_close(together.centroids, acquire_run_lock.centroids)


@pytest.mark.parametrize("metric", METRICS)
def test_the_key_alone_decides(metric):
    rows = blobs(400, 6, 5)
    settings = {"num_clusters": 5, "metric": metric, "restarts": [0], "max_iterations": 1, "tolerance": 0.0}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = kmeans(rows, key=KEY, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(kmeans(rows, key=KEY, **settings).centroids, found.centroids)
    assert not torch.equal(kmeans(rows, key=(1, "test"), **settings).centroids, found.centroids)


@pytest.mark.parametrize("metric", METRICS)
def test_order_of_rows_and_of_centroids(metric):
    rows, starts = blobs(500, 8, 4), blobs(6, 8, 4, seed=2)
    found = lloyd(rows, starts, metric=metric, **SETTINGS)
    rows_in, ids_in = torch.randperm(500), torch.randperm(6)
    moved = lloyd(rows[rows_in], starts[ids_in], metric=metric, **SETTINGS)
    assert torch.equal(ids_in[moved.assignments], found.assignments[rows_in])
    torch.testing.assert_close(moved.centroids, found.centroids[ids_in])
    assert moved.inertia == pytest.approx(found.inertia, rel=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_the_result_is_consistent(metric):
    rows = blobs(1000, 16, 6)
    found = kmeans(rows, num_clusters=6, metric=metric, restarts=range(3), key=KEY, **SETTINGS)
    ids, distances = nearest(rows, found.centroids, metric=metric)
    assert torch.equal(ids, found.assignments)
    assert found.inertia == pytest.approx(float(distances.double().sum()), rel=1e-5)
    assert found.centroids.dtype == rows.dtype and found.assignments.dtype == torch.int64
    shorter = kmeans(
        rows,
        num_clusters=6,
        metric=metric,
        restarts=range(3),
        key=KEY,
        max_iterations=1,
        tolerance=SETTINGS["tolerance"],
    )
    assert shorter.iterations == 1 and shorter.inertia > found.inertia


@pytest.mark.parametrize("clusters", [3, 12])
def test_as_good_as_scikit_learn(clusters):
    rows = blobs(1500, 10, 8, noise=0.7)
    found = kmeans(rows, num_clusters=clusters, metric="euclidean", restarts=range(10), key=KEY, **SETTINGS)
    assert found.inertia <= KMeans(clusters, n_init=10, random_state=0).fit(rows.numpy()).inertia_ * 1.002


def test_cosine_ignores_lengths():
    rows = blobs(300, 5, 3, dtype=torch.float64)
    lengths = torch.rand(300, 1, dtype=torch.float64) + 0.1
    settings = {"num_clusters": 3, "metric": "cosine", "restarts": range(2), "key": KEY, **SETTINGS}
    one, other = kmeans(rows, **settings), kmeans(rows * lengths, **settings)
    assert torch.equal(one.assignments, other.assignments)
    assert one.centroids.norm(dim=1).lt(1).all()  # means of unit rows, not unit themselves


def test_euclidean_far_from_the_origin():
    rows = blobs(400, 6, 4, noise=0.2)
    settings = {"num_clusters": 4, "metric": "euclidean", "restarts": range(4), "key": KEY, **SETTINGS}
    near, far = kmeans(rows, **settings), kmeans(rows + 4096, **settings)
    assert torch.equal(near.assignments, far.assignments)
    assert far.inertia == pytest.approx(near.inertia, rel=1e-2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types(metric, dtype):
    rows = blobs(60, 4, 3, noise=0.1, dtype=dtype)
    settings = {"num_clusters": 3, "metric": metric, "restarts": range(3), "key": KEY, **SETTINGS}
    found = kmeans(rows, **settings)
    assert found.centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kmeans(rows.requires_grad_(), **settings).centroids, found.centroids)


def test_products_are_exact_and_settings_come_back():
    rows = blobs(200, 64, 3)
    torch.set_float32_matmul_precision("medium")
    try:
        found = kmeans(rows, num_clusters=3, metric="cosine", restarts=[0], key=KEY, **SETTINGS)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = kmeans(rows, num_clusters=3, metric="cosine", restarts=[0], key=KEY, **SETTINGS)
    assert torch.equal(found.centroids, expected.centroids)


def test_a_cosine_cluster_without_rows_is_the_zero_vector_and_can_win_rows_back():
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.1]])
    starts = torch.tensor([[0.5, 0.4], [1.0, 0.0], [3.0, -3.0]])
    # All three are nearest to start 0 or 1; cluster 2 becomes zero and takes the row with negative cosines.
    first = lloyd(rows, starts, metric="cosine", max_iterations=1, tolerance=0.0)
    assert first.centroids[2].tolist() == [0, 0]
    ids, distances = nearest(rows, first.centroids, metric="cosine")
    assert ids.tolist() == first.assignments.tolist()
    assert distances[ids == 2].eq(1).all()
    assert nearest(rows, torch.zeros(2, 2), metric="cosine")[1].eq(1).all()


def test_a_euclidean_cluster_without_rows_takes_the_farthest_row():
    rows = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    found = lloyd(rows, torch.tensor([[1.0], [100.0]]), metric="euclidean", **SETTINGS)
    assert found.assignments.tolist() == [0, 0, 0, 1]
    assert found.centroids.tolist() == [[1], [9]]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 7, 5000])
def test_identical_rows(metric, dtype, size):
    rows = torch.tensor([[0.3, -0.7, 0.2]], dtype=dtype).expand(size, -1)
    for clusters in {1, min(size, 4)}:
        found = kmeans(rows, num_clusters=clusters, metric=metric, restarts=range(3), key=KEY, **SETTINGS)
        assert found.assignments.eq(0).all()
        assert found.inertia == pytest.approx(0, abs=1e-9)
        assert found.iterations == 1
        assert found.centroids.isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
def test_more_clusters_than_distinct_rows(metric):
    distinct = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    rows = distinct.repeat(20, 1)
    found = kmeans(rows, num_clusters=8, metric=metric, restarts=range(5), key=KEY, **SETTINGS)
    assert found.inertia == pytest.approx(0, abs=1e-6)
    groups = [set(found.assignments[start::3].tolist()) for start in range(3)]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) == 3


@pytest.mark.parametrize("metric", METRICS)
def test_as_many_clusters_as_rows(metric):
    rows = blobs(40, 6, 3)
    found = kmeans(rows, num_clusters=40, metric=metric, restarts=[0], key=KEY, **SETTINGS)
    assert sorted(found.assignments.tolist()) == list(range(40))
    assert found.inertia == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_one_cluster(metric):
    rows = blobs(50, 4, 3)
    found = kmeans(rows, num_clusters=1, metric=metric, restarts=range(2), key=KEY, **SETTINGS)
    mean = (normalize(rows, dim=1) if metric == "cosine" else rows).mean(0)
    torch.testing.assert_close(found.centroids[0], mean)


def test_zero_rows_are_at_distance_one():
    rows = torch.cat([torch.zeros(3, 4), blobs(30, 4, 2)])
    found = kmeans(rows, num_clusters=3, metric="cosine", restarts=range(3), key=KEY, **SETTINGS)
    _, distances = nearest(rows, found.centroids, metric="cosine")
    assert distances[:3].eq(1).all()
    assert found.assignments[:3].eq(0).all()
    assert found.inertia == pytest.approx(float(distances.sum()), rel=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_what_cannot_be_clustered(metric):
    rows = blobs(5, 3, 2)
    settings = {"metric": metric, "restarts": [0], "key": KEY, **SETTINGS}
    for clusters in (0, 6):
        with pytest.raises(InputError, match=f"asked for {clusters} clusters of 5 rows"):
            kmeans(rows, num_clusters=clusters, **settings)
    rows[1, 2], rows[4, 0] = math.nan, math.inf
    with pytest.raises(InputError, match=r"in 2 of 5 feature rows \(1, 4\)"):
        kmeans(rows, num_clusters=2, **settings)
    with pytest.raises(InputError, match="cosine or euclidean"):
        kmeans(blobs(5, 3, 2), num_clusters=2, **{**settings, "metric": "manhattan"})
