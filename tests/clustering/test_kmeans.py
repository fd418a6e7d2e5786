"""k-means against plain loops in float64, its invariances, and inputs at the edge."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch.nn.functional import normalize

from deepclust.clustering.kmeans import (
    _sum_clusters,
    _sum_clusters_by_products,
    best_result,
    kmeans,
    kmeans_from_centroids,
)
from deepclust.clustering.kmeans_distances import KMeansData, nearest_centroids
from deepclust.errors import InputError
from tests.clustering.kmeans_reference import KEY, METRICS, SETTINGS, make_blobs, slow_lloyd


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(METRICS), st.integers(2, 40), st.integers(1, 5), st.integers(1, 8), st.integers(0, 10**6))
def test_iterations_equal_plain_loops(metric, num_rows, num_features, num_clusters, seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_rows, num_features)) + rng.normal(size=num_features)
    centroids = 2 * rng.normal(size=(num_clusters, num_features))  # some win no row
    result = kmeans_from_centroids(torch.from_numpy(rows), torch.from_numpy(centroids), metric=metric, **SETTINGS)
    assignments, means, inertia, iterations = slow_lloyd(rows, centroids, metric, **SETTINGS)
    assert result.assignments.tolist() == assignments
    np.testing.assert_allclose(result.centroids.numpy(), means, atol=1e-12)
    assert result.inertia == pytest.approx(inertia, rel=1e-6, abs=1e-9)
    assert result.iterations == iterations


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_sums_are_the_same_by_products(num_rows, num_clusters, num_restarts, seed):
    generator = torch.Generator().manual_seed(seed)
    data = KMeansData(torch.randn(num_rows, 3, generator=generator), "euclidean")
    assignments = torch.randint(num_clusters, (num_restarts, num_rows), generator=generator)
    sums, counts = _sum_clusters(data, assignments, num_clusters)  # as on a CPU
    gpu_sums, gpu_counts = _sum_clusters_by_products(data, assignments, num_clusters)
    torch.testing.assert_close(gpu_sums, sums, rtol=0, atol=1e-9)
    assert torch.equal(gpu_counts, counts)


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_of_some_restarts_each_is_the_best_of_all(metric):
    rows = make_blobs(700, 20, 6)
    for clusters in (1, 3, 7):
        arguments = {"num_clusters": clusters, "metric": metric, "key": KEY, **SETTINGS}
        whole = kmeans(rows, restarts=range(10), **arguments)
        single = [kmeans(rows, restarts=[restart], **arguments) for restart in range(10)]
        halves = [kmeans(rows, restarts=part, **arguments) for part in ([8, 4, 0, 2, 6], [1, 9, 3, 5, 7])]
        for parts in (single, halves):
            best = best_result(parts)
            assert (best.inertia, best.restart, best.iterations) == (whole.inertia, whole.restart, whole.iterations)
            assert torch.equal(best.assignments, whole.assignments) and torch.equal(best.centroids, whole.centroids)
        assert whole.inertia == min(result.inertia for result in single)


@pytest.mark.parametrize("metric", METRICS)
def test_all_restarts_in_one_group_as_on_a_gpu_give_what_each_gives_alone(metric, monkeypatch):
    near_several_centroids = make_blobs(100, 4, 1).round()
    rows = torch.cat([make_blobs(300, 4, 5), near_several_centroids])
    rows = torch.cat([rows, rows[:50]])
    arguments = {"num_clusters": 5, "metric": metric, "restarts": range(6), "key": KEY, **SETTINGS}
    one_by_one = kmeans(rows, **arguments)
    monkeypatch.setattr(KMeansData, "restart_groups", lambda self, num_restarts: [slice(0, num_restarts)])
    in_one_group = kmeans(rows, **arguments)
    assert in_one_group.assignments.equal(one_by_one.assignments) and in_one_group.restart == one_by_one.restart
    torch.testing.assert_close(in_one_group.centroids, one_by_one.centroids)


@pytest.mark.parametrize("metric", METRICS)
def test_random_numbers_hang_on_the_key_alone(metric):
    rows = make_blobs(400, 6, 5)
    arguments = {"num_clusters": 5, "metric": metric, "restarts": [0], "max_iterations": 1, "tolerance": 0.0}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    result = kmeans(rows, key=KEY, **arguments)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(kmeans(rows, key=KEY, **arguments).centroids, result.centroids)
    assert not torch.equal(kmeans(rows, key=(1, "test"), **arguments).centroids, result.centroids)


@pytest.mark.parametrize("metric", METRICS)
def test_the_order_of_rows_and_of_centroids_is_immaterial(metric):
    rows, starts = make_blobs(500, 8, 4), make_blobs(6, 8, 4, seed=2)
    result = kmeans_from_centroids(rows, starts, metric=metric, **SETTINGS)
    row_order, cluster_order = torch.randperm(500), torch.randperm(6)
    reordered = kmeans_from_centroids(rows[row_order], starts[cluster_order], metric=metric, **SETTINGS)
    assert torch.equal(cluster_order[reordered.assignments], result.assignments[row_order])
    torch.testing.assert_close(reordered.centroids, result.centroids[cluster_order])
    assert reordered.inertia == pytest.approx(result.inertia, rel=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_the_result_is_consistent(metric):
    rows = make_blobs(1000, 16, 6)
    result = kmeans(rows, num_clusters=6, metric=metric, restarts=range(3), key=KEY, **SETTINGS)
    assignments, distances = nearest_centroids(rows, result.centroids, metric=metric)
    assert torch.equal(assignments, result.assignments)
    assert result.inertia == pytest.approx(float(distances.double().sum()), rel=1e-5)
    assert result.centroids.dtype == rows.dtype and result.assignments.dtype == torch.int64
    shorter = kmeans(
        rows,
        num_clusters=6,
        metric=metric,
        restarts=range(3),
        key=KEY,
        max_iterations=1,
        tolerance=SETTINGS["tolerance"],
    )
    assert shorter.iterations == 1 and shorter.inertia > result.inertia


@pytest.mark.parametrize("clusters", [3, 12])
def test_as_good_as_scikit_learn(clusters):
    rows = make_blobs(1500, 10, 8, noise=0.7)
    result = kmeans(rows, num_clusters=clusters, metric="euclidean", restarts=range(10), key=KEY, **SETTINGS)
    assert result.inertia <= KMeans(clusters, n_init=10, random_state=0).fit(rows.numpy()).inertia_ * 1.002


def test_cosine_ignores_lengths():
    rows = make_blobs(300, 5, 3, dtype=torch.float64)
    lengths = torch.rand(300, 1, dtype=torch.float64) + 0.1
    arguments = {"num_clusters": 3, "metric": "cosine", "restarts": range(2), "key": KEY, **SETTINGS}
    result, scaled = kmeans(rows, **arguments), kmeans(rows * lengths, **arguments)
    assert torch.equal(result.assignments, scaled.assignments)
    assert result.centroids.norm(dim=1).lt(1).all()  # means of unit rows, not unit themselves


def test_euclidean_far_from_the_origin():
    rows = make_blobs(400, 6, 4, noise=0.2)
    arguments = {"num_clusters": 4, "metric": "euclidean", "restarts": range(4), "key": KEY, **SETTINGS}
    near, far = kmeans(rows, **arguments), kmeans(rows + 4096, **arguments)
    assert torch.equal(near.assignments, far.assignments)
    assert far.inertia == pytest.approx(near.inertia, rel=1e-2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_autocast(metric, dtype):
    rows = make_blobs(60, 4, 3, noise=0.1, dtype=dtype)
    arguments = {"num_clusters": 3, "metric": metric, "restarts": range(3), "key": KEY, **SETTINGS}
    result = kmeans(rows, **arguments)
    assert result.centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kmeans(rows.requires_grad_(), **arguments).centroids, result.centroids)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 7, 5000])
def test_identical_rows(metric, dtype, size):
    rows = torch.tensor([[0.3, -0.7, 0.2]], dtype=dtype).expand(size, -1)
    for clusters in {1, min(size, 4)}:
        result = kmeans(rows, num_clusters=clusters, metric=metric, restarts=range(3), key=KEY, **SETTINGS)
        assert result.assignments.eq(0).all()
        assert result.inertia == pytest.approx(0, abs=1e-9)
        assert result.iterations == 1
        assert result.centroids.isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
def test_more_clusters_than_distinct_rows(metric):
    distinct = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    rows = distinct.repeat(20, 1)
    result = kmeans(rows, num_clusters=8, metric=metric, restarts=range(5), key=KEY, **SETTINGS)
    assert result.inertia == pytest.approx(0, abs=1e-6)
    groups = [set(result.assignments[start::3].tolist()) for start in range(3)]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) == 3


@pytest.mark.parametrize("metric", METRICS)
def test_as_many_clusters_as_rows(metric):
    rows = make_blobs(40, 6, 3)
    result = kmeans(rows, num_clusters=40, metric=metric, restarts=[0], key=KEY, **SETTINGS)
    assert sorted(result.assignments.tolist()) == list(range(40))
    assert result.inertia == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_one_cluster(metric):
    rows = make_blobs(50, 4, 3)
    result = kmeans(rows, num_clusters=1, metric=metric, restarts=range(2), key=KEY, **SETTINGS)
    mean = (normalize(rows, dim=1) if metric == "cosine" else rows).mean(0)
    torch.testing.assert_close(result.centroids[0], mean)


def test_zero_rows_are_at_distance_one():
    rows = torch.cat([torch.zeros(3, 4), make_blobs(30, 4, 2)])
    result = kmeans(rows, num_clusters=3, metric="cosine", restarts=range(3), key=KEY, **SETTINGS)
    _, distances = nearest_centroids(rows, result.centroids, metric="cosine")
    assert distances[:3].eq(1).all()
    assert result.assignments[:3].eq(0).all()
    assert result.inertia == pytest.approx(float(distances.sum()), rel=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_impossible_requests_are_refused(metric):
    rows = make_blobs(5, 3, 2)
    arguments = {"metric": metric, "restarts": [0], "key": KEY, **SETTINGS}
    for clusters in (0, 6):
        with pytest.raises(InputError, match=f"asked for {clusters} clusters of 5 rows"):
            kmeans(rows, num_clusters=clusters, **arguments)
    rows[1, 2], rows[4, 0] = math.nan, math.inf
    with pytest.raises(InputError, match=r"in 2 of 5 feature rows \(1, 4\)"):
        kmeans(rows, num_clusters=2, **arguments)
    with pytest.raises(InputError, match="cosine or euclidean"):
        kmeans(make_blobs(5, 3, 2), num_clusters=2, **{**arguments, "metric": "manhattan"})
