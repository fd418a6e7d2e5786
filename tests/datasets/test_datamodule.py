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
