"""The DataModule: batches of an epoch, shares of processes, and companions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepclust.datasets.datamodule import ImageDataModule
from deepclust.datasets.image_sources import ArraySource
from deepclust.views.geometry import Resize
from deepclust.views.multiview import MultiView


def make_datamodule(images, batch_size, *, drop_last, extra=0):
    def make_source(size):
        return ArraySource([np.arange(size * 4, dtype=np.uint8).reshape(size, 2, 2, 1)], 1)

    views = MultiView(pipelines={"clean": [Resize(size=2)]}, names=["clean"], mean=None, std=None)
    return ImageDataModule(
        fit=make_source(images),
        extra=make_source(extra) if extra else None,
        views=views,
        batch_size=batch_size,
        clean_batch_size=4,
        drop_last=drop_last,
        resident_bytes=0,
        seed=0,
    )


@pytest.mark.parametrize(
    ("images", "expected"),
    [(48, [16, 16, 16]), (34, [16, 16, 2]), (33, [16, 17]), (17, [17]), (15, [15]), (1, [1])],
)
def test_without_drop_last_an_epoch_holds_every_image_once(images, expected):
    data = make_datamodule(images, 16, drop_last=False)
    for epoch in range(3):
        batches = data.draw_epoch_batches(epoch, None)
        assert [len(b) for b in batches] == expected and len(batches) == data.batches_per_epoch
        assert sorted(np.concatenate(batches).tolist()) == list(range(images))


def test_without_shuffle_images_keep_their_order():
    data = make_datamodule(34, 16, drop_last=False)
    for epoch in range(2):
        assert np.concatenate(data.draw_epoch_batches(epoch, None, shuffle=False)).tolist() == list(range(34))
        batches = [indices for indices, _, _ in data.list_epoch_batches(epoch, None, shuffle=False)]
        assert [len(b) for b in batches] == [16, 16, 2] and np.concatenate(batches).tolist() == list(range(34))


@pytest.mark.parametrize(("images", "expected"), [(128, 1), (143, 1), (144, 2), (50_000, 391), (105_000, 821)])
def test_a_rest_below_an_eighth_of_a_batch_is_not_a_batch(images, expected):
    assert make_datamodule(images, 128, drop_last=False).batches_per_epoch == expected


@pytest.mark.parametrize(("images", "expected"), [(48, [16, 16, 16]), (47, [16, 16])])
def test_drop_last_leaves_the_rest_out(images, expected):
    assert [len(b) for b in make_datamodule(images, 16, drop_last=True).draw_epoch_batches(0, None)] == expected


def test_extra_images_come_first_with_indices_after_those_of_fit():
    data = make_datamodule(20, 8, drop_last=False, extra=9)
    batches = data.draw_epoch_batches(0, None)
    assert [len(b) for b in batches] == [9, 8, 8, 4] and data.batches_per_epoch == 4
    assert sorted(batches[0].tolist()) == list(range(20, 29))


class MethodWithCompanions:
    """Asks for the next two images as companions of each image."""

    weight_dtype = torch.float32

    def companions(self, indices, draws):
        return torch.stack([indices + 1, indices + 2], 1) % 21


def test_shares_of_the_processes_make_up_a_batch_with_its_companions(monkeypatch):
    data = make_datamodule(21, 16, drop_last=False)
    data.trainer = SimpleNamespace(lightning_module=MethodWithCompanions())
    indices = data.draw_epoch_batches(0, None)[-1]
    shares = []
    for rank in range(3):
        monkeypatch.setattr("deepclust.engine.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("deepclust.engine.distributed.world_size", lambda: 3)
        batch = data.read_batch(indices, 0, 1)
        size = len(batch.images)
        assert batch.draws.global_batch_size == 5
        assert torch.equal(batch.indices, torch.from_numpy(indices)[batch.draws.local_rows(size)])
        assert torch.equal(batch.companions, MethodWithCompanions().companions(batch.indices, None))
        views = data.on_after_batch_transfer(batch, 0)
        for slot, view in enumerate(views.companion_views):
            assert torch.equal(view, data.views.clean(data.fit.read(batch.companions[:, slot].numpy())))
        assert len(views.companion_views) == 2 and torch.equal(views.companions, batch.companions)
        shares.append(batch.indices)
    assert torch.cat(shares).tolist() == indices.tolist() and [len(s) for s in shares] == [1, 2, 2]


def test_a_method_without_companions():
    data = make_datamodule(20, 8, drop_last=False)
    method = SimpleNamespace(weight_dtype=torch.float32, companions=lambda indices, draws: None)
    data.trainer = SimpleNamespace(lightning_module=method)
    batch = data.on_after_batch_transfer(data.read_batch(np.arange(8), 0, 0), 0)
    assert batch.companion_views == () and batch.companions.shape == (8, 0)


class MethodWithExtraImagesUntil:
    def __init__(self, epoch):
        self.epoch = epoch

    def uses_extra_images(self, epoch):
        return epoch < self.epoch


def test_epochs_without_extra_images_are_shorter():
    data = make_datamodule(20, 8, drop_last=True, extra=24)
    data.trainer = SimpleNamespace(lightning_module=MethodWithExtraImagesUntil(2), accumulate_grad_batches=1)
    assert [data.count_batches_of_epoch(epoch) for epoch in range(4)] == [5, 5, 2, 2]
    for epoch in range(4):
        batches = list(data.list_epoch_batches(epoch, None))
        assert [number for *_, number in batches] == list(range(data.count_batches_of_epoch(epoch)))
        assert all(e == epoch for _, e, _ in batches)
        assert sum(int(indices[0] >= 20) for indices, *_ in batches) == (3 if epoch < 2 else 0)


@pytest.mark.parametrize("extra", [0, 24])
@pytest.mark.parametrize("num_accumulated", [1, 2, 3, 5, 16])
def test_accumulation_runs_over_the_end_of_a_pass(num_accumulated, extra):
    data = make_datamodule(60, 8, drop_last=True, extra=extra)  # passes of 7 batches, those with extra images of 10
    data.trainer = SimpleNamespace(
        lightning_module=MethodWithExtraImagesUntil(2), accumulate_grad_batches=num_accumulated
    )
    passes = [data.draw_epoch_batches(epoch, None) for epoch in range(7)]
    whole = [(epoch, number, b.tolist()) for epoch, batches in enumerate(passes) for number, b in enumerate(batches)]
    epochs = [[(e, n, b.tolist()) for b, e, n in data.list_epoch_batches(epoch, None)] for epoch in range(6)]
    assert [len(batches) for batches in epochs] == [data.count_batches_of_epoch(e) for e in range(6)]
    joined = [batch for batches in epochs for batch in batches]
    assert joined == whole[: len(joined)], "the same batches in the same order"
    ends = np.cumsum([len(batches) for batches in epochs])
    ends_of_passes = np.cumsum([len(batches) for batches in passes[:6]])
    if num_accumulated <= 7:
        assert not any(ends % num_accumulated), "only whole optimiser steps"
        assert ((ends >= ends_of_passes) & (ends < ends_of_passes + num_accumulated)).all()
    else:
        assert (ends == ends_of_passes).all(), "a pass that is shorter than a step is a step of its own"
