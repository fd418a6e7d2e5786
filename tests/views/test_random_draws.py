"""Draws are packed for a device and unpacked there; operations change the chosen images only."""

from contextlib import suppress

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from deepclust.views.random_draws import (
    ALIGNMENT,
    apply_to_chosen,
    apply_to_chosen_,
    make_constants,
    pack_tensors,
    unpack_tensors,
)
from tests.host_waits import HostOperations
from tests.views.conftest import imitate_gpu, make_images, seeded_generator

CPU = torch.device("cpu")


def test_draws_are_packed_into_one_buffer_and_unpacked():
    generator = seeded_generator()
    groups = [
        {"flags": torch.rand(7, generator=generator) < 0.5, "none": torch.empty(0, 2)},
        {},
        {"floats": torch.randn(3, 5, generator=generator).T, "whole": torch.randint(99, (1, 3), generator=generator)},
    ]
    packed, layout = pack_tensors(groups, CPU)
    assert packed.dtype == torch.uint8 and packed.dim() == 1
    assert hash(layout) == hash(pack_tensors(groups, CPU)[1])
    for group, unpacked in zip(groups, unpack_tensors(packed, layout), strict=True):
        assert list(unpacked) == list(group)
        for name, values in group.items():
            assert unpacked[name].dtype == values.dtype and torch.equal(unpacked[name], values)
            assert unpacked[name].storage_offset() * values.itemsize % ALIGNMENT == 0
            copied = unpacked[name].untyped_storage()._cdata != packed.untyped_storage()._cdata
            assert copied == (values.dtype == torch.bool)
    empty, layout = pack_tensors([{}], CPU)
    assert empty.shape == (0,) and unpack_tensors(empty, layout) == [{}]


def test_constants_equal_a_tensor_of_the_list():
    for values in ([3, 4], [0.1, 1 / 3, 1e-9], [0.5]):
        expected = torch.tensor(values)
        constants = make_constants(values, CPU)
        assert constants.dtype == expected.dtype and torch.equal(constants, expected)


@pytest.mark.parametrize("chosen", [[0, 0, 0], [1, 1, 1], [0, 1, 0], [0], [1]])
@pytest.mark.parametrize("imitates_gpu", [False, True])
def test_chosen_images_change_by_their_own_parameters(chosen, imitates_gpu, monkeypatch):
    if imitates_gpu:
        imitate_gpu(monkeypatch)
    images, chosen = make_images(len(chosen), 3, 4), torch.tensor(chosen, dtype=torch.bool)
    original, amounts = images.clone(), torch.arange(len(chosen)) + 1.0
    expected = images + (chosen * amounts)[:, None, None, None]

    def add(rows, amounts):
        return rows + amounts[:, None, None, None]

    assert torch.equal(apply_to_chosen(images, chosen, add, amounts), expected) and torch.equal(images, original)
    assert torch.equal(apply_to_chosen_(images, chosen, add, amounts), expected)


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
def test_work_of_the_host_is_detected(work):
    with FakeTensorMode():
        on_gpu = torch.ones(3, device="cuda")
        with HostOperations() as host_operations, suppress(DataDependentOutputException, DynamicOutputShapeException):
            work(on_gpu)
    assert host_operations.names
