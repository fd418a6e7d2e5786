"""Draws on their way to a device, and what is done to the rows they choose."""

from contextlib import suppress

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from deepclust.views.random_draws import ALIGNMENT, change, change_, numbers, pack, unpack
from tests.host_waits import HostWork
from tests.views.conftest import as_on_a_gpu, pictures, seeded

CPU = torch.device("cpu")


def test_all_draws_travel_as_one_buffer():
    source = seeded()
    groups = [
        {"flags": torch.rand(7, generator=source) < 0.5, "none": torch.empty(0, 2)},
        {},
        {"floats": torch.randn(3, 5, generator=source).T, "whole": torch.randint(99, (1, 3), generator=source)},
    ]
    packed, layout = pack(groups, CPU)
    assert packed.dtype == torch.uint8 and packed.dim() == 1
    assert hash(layout) == hash(pack(groups, CPU)[1])
    for group, found in zip(groups, unpack(packed, layout), strict=True):
        assert list(found) == list(group)
        for name, values in group.items():
            assert found[name].dtype == values.dtype and torch.equal(found[name], values)
            assert found[name].storage_offset() * values.itemsize % ALIGNMENT == 0
            copied = found[name].untyped_storage()._cdata != packed.untyped_storage()._cdata
            assert copied == (values.dtype == torch.bool)
    nothing, layout = pack([{}], CPU)
    assert nothing.shape == (0,) and unpack(nothing, layout) == [{}]


def test_numbers_are_those_of_a_list():
    for values in ([3, 4], [0.1, 1 / 3, 1e-9], [0.5]):
        expected = torch.tensor(values)
        found = numbers(values, CPU)
        assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("chosen", [[0, 0, 0], [1, 1, 1], [0, 1, 0], [0], [1]])
@pytest.mark.parametrize("on_all_rows", [False, True])
def test_chosen_rows_change_by_their_own_parameters(chosen, on_all_rows, monkeypatch):
    if on_all_rows:
        as_on_a_gpu(monkeypatch)
    images, chosen = pictures(len(chosen), 3, 4), torch.tensor(chosen, dtype=torch.bool)
    kept, amounts = images.clone(), torch.arange(len(chosen)) + 1.0
    expected = images + (chosen * amounts)[:, None, None, None]

    def add(rows, amounts):
        return rows + amounts[:, None, None, None]

    assert torch.equal(change(images, chosen, add, amounts), expected) and torch.equal(images, kept)
    assert torch.equal(change_(images, chosen, add, amounts), expected)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x[:1]),
        lambda x: x.masked_select(x > 0),
        lambda x: x.nonzero(),
        lambda x: float(x[0]),
        lambda x: x * torch.tensor([1.0, 2.0, 3.0]).to(x.device),
        lambda x: x * torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: x.to("cpu"),
    ],
)
def test_work_of_the_host_is_found(work):
    with FakeTensorMode():
        there = torch.ones(3, device="cuda")
        with HostWork() as noted, suppress(DataDependentOutputException, DynamicOutputShapeException):
            work(there)
    assert noted.found
