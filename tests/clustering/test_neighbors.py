"""Nearest neighbours against a full sort in float64."""

import pytest
import torch

from deepclust.clustering import neighbors
from deepclust.clustering.neighbors import mine_neighbors, nearest_neighbors, neighbors_on_all_ranks
from deepclust.engine import distributed
from deepclust.errors import InputError

METRICS = ("inner_product", "euclidean")


def make_rows(num_rows, seed=0):
    return torch.randn(num_rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_nearest_neighbors(queries, keys, k, metric, exclude):
    """A stable sort of all values, so that the lowest index comes first among equals."""
    values = queries @ keys.T if metric == "inner_product" else -torch.cdist(queries, keys)
    if exclude is not None:
        values[torch.arange(len(queries)), exclude] = -torch.inf
    values, indices = values.sort(dim=1, descending=True, stable=True)
    return (values if metric == "inner_product" else -values)[:, :k], indices[:, :k]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("self_excluded", [False, True])
@pytest.mark.parametrize("k", [1, 7, 199])
def test_equals_a_full_sort(metric, self_excluded, k, monkeypatch):
    monkeypatch.setattr(neighbors, "CPU_CHUNK_PRODUCTS", 64 * 200)  # several chunks
    rows = make_rows(200)
    exclude = torch.arange(200) if self_excluded else None
    values, indices = nearest_neighbors(rows, rows, k, metric=metric, exclude=exclude)
    expected_values, expected_indices = slow_nearest_neighbors(rows, rows, k, metric, exclude)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(values, expected_values)
    if metric == "euclidean" and not self_excluded:
        assert torch.equal(indices[:, 0], torch.arange(200)) and values[:, 0].eq(0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_queries_that_are_not_among_the_keys(metric):
    queries, keys = make_rows(30), make_rows(90, seed=1)
    _, indices = nearest_neighbors(queries, keys, 4, metric=metric, exclude=None)
    assert torch.equal(indices, slow_nearest_neighbors(queries, keys, 4, metric, None)[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 3, 10, 49, 50])
def test_the_lowest_index_comes_first_among_equals(metric, k):
    keys = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).repeat(25, 1)
    _, indices = nearest_neighbors(keys[:2], keys, k, metric=metric, exclude=None)
    expected = torch.cat([torch.arange(0, 50, 2), torch.arange(1, 50, 2)])
    assert indices[0].tolist() == expected[:k].tolist()
    assert indices[1].tolist() == torch.cat([torch.arange(1, 50, 2), torch.arange(0, 50, 2)])[:k].tolist()


def test_euclidean_far_from_the_origin():
    rows = make_rows(100).float()
    near = nearest_neighbors(rows, rows, 5, metric="euclidean", exclude=None)
    far = nearest_neighbors(rows + 1024, rows + 1024, 5, metric="euclidean", exclude=None)
    assert torch.equal(near[1], far[1])
    torch.testing.assert_close(near[0], far[0], rtol=1e-2, atol=1e-3)


def test_impossible_requests_are_refused():
    rows = make_rows(5)
    with pytest.raises(InputError, match="5 neighbours were asked for among 5 rows"):
        nearest_neighbors(rows, rows, 5, metric="euclidean", exclude=torch.arange(5))
    rows[3, 0] = torch.nan
    with pytest.raises(InputError, match=r"\(3\)"):
        nearest_neighbors(rows, rows, 2, metric="euclidean", exclude=None)


def test_mined_neighbours_are_each_row_and_its_nearest_others_by_cosine():
    rows = make_rows(40)
    unit = torch.nn.functional.normalize(rows, dim=1)
    itself = torch.arange(40)
    table = mine_neighbors(rows * torch.rand(40, 1, dtype=torch.float64).add(0.1), 5)
    assert torch.equal(table[:, 0], itself)
    assert torch.equal(table[:, 1:], slow_nearest_neighbors(unit, unit, 5, "inner_product", itself)[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("excludes_itself", [False, True])
@pytest.mark.parametrize("processes", [2, 5])
def test_the_parts_of_several_processes_are_the_table_of_one(metric, excludes_itself, processes, monkeypatch):
    monkeypatch.setattr(neighbors, "CPU_CHUNK_PRODUCTS", 64 * 230)  # four blocks: one of five processes has none
    rows = make_rows(230).float()
    arguments = {"metric": metric, "excludes_itself": excludes_itself}
    expected = nearest_neighbors(rows, rows, 6, metric=metric, exclude=torch.arange(230) if excludes_itself else None)
    parts = []
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setattr(distributed, "all_gather", lambda part: part)
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(neighbors_on_all_ranks(rows, 6, **arguments))
    for table, whole in zip(zip(*parts, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(table), whole)
