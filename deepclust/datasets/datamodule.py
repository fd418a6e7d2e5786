"""From stored images to the batches of a training step, and to the clean pass."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from deepclust.batch import Draws, ImageBatch, TrainBatch
from deepclust.datasets.image_sources import ImageSource, ResidentSource
from deepclust.engine import distributed
from deepclust.engine.randomness import generator
from deepclust.errors import InputError
from deepclust.views.multiview import MultiView


class ImageDataModule(LightningDataModule):
    """Batches of `fit` (and `extra`) images as views on the device. Labels are not in here.

    An epoch is one pass over `extra`, where there is one, then one over `fit`; in each, every image once in an order
    that depends on the seed and the epoch only, or drawn with the method's `sampling_weights`. `batch_size` counts
    the images of all processes together; each takes its share of every batch, so a batch is the same on any number of
    them. `drop_last` leaves out what does not fill a batch; else that makes a batch of its own or, below an eighth of
    one, joins the batch before it. Images of up to `resident_bytes` are held on the device while a trainer is at work.

    Raises:
        InputError: where the batch is larger than the set or does not divide among the processes.
    """

    def __init__(
        self,
        *,
        fit: ImageSource,
        extra: ImageSource | None,
        views: MultiView,
        batch_size: int,
        clean_batch_size: int,
        drop_last: bool,
        resident_bytes: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.fit = fit
        self.extra = extra
        self.views = views
        self.batch_size = batch_size
        self.clean_batch_size = clean_batch_size
        self.drop_last = drop_last
        self.resident_bytes = resident_bytes
        self.seed = seed
        self.resident: dict[ImageSource, ResidentSource] = {}
        self.pins = False  # whether what is read waits in memory from which a GPU can fetch it by itself
        if batch_size > len(fit) and drop_last:
            raise InputError(
                f"batch_size is {batch_size} and the data set holds {len(fit)} images",
                expected="a batch no larger than the set",
                do=f"set batch_size={len(fit)} or less",
            )

    # Training ---------------------------------------------------------------------------------------------------------

    @property
    def batches_per_epoch(self) -> int:
        """Batches in an epoch, those of `extra` included."""
        return self.count_batches(self.fit) + self.count_batches(self.extra)

    def count_batches(self, source: ImageSource | None) -> int:
        """Batches that one pass over `source` gives."""
        full, rest = divmod(0 if source is None else len(source), self.batch_size)
        # Fewer images have no batch statistics worth the name, and every process is to get some of them.
        enough = rest >= max(2, self.batch_size / 8) or (full == 0 and rest > 0)
        return full + (enough and not self.drop_last)

    def setup(self, stage: str) -> None:
        processes = distributed.world_size()
        if self.batch_size % processes:
            raise InputError(
                f"batch_size is {self.batch_size} on {processes} processes",
                expected="a global batch that divides among the processes",
                do=f"set batch_size={self.batch_size // processes * processes or processes}",
            )
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        self.pins = device.type == "cuda"
        left = self.resident_bytes
        for source in (self.fit, self.extra):
            if source is not None and (size := source.read(np.arange(1)).nbytes * len(source)) <= left:
                self.resident[source] = ResidentSource(source, device)
                left -= size

    def teardown(self, stage: str) -> None:
        self.resident.clear()

    def read(self, source: ImageSource, indices: np.ndarray) -> Tensor:
        """Images (N, channels, H, W) of a source, from the device where it is held there."""
        images = self.resident.get(source, source).read(indices)
        return images.pin_memory() if self.pins and images.is_cpu else images

    def train_dataloader(self) -> "TrainLoader":
        return TrainLoader(self)

    def epoch_indices(self, epoch: int, weights: Tensor | None) -> list[np.ndarray]:
        """The global batches of an epoch, as indices; those of `extra` come first and count on from len(fit)."""
        batches = []
        if self.extra is not None:
            order = torch.randperm(len(self.extra), generator=generator(self.seed, "order of extra images", epoch))
            batches += self.cut(order + len(self.fit), self.count_batches(self.extra))
        number, drawn = self.count_batches(self.fit), generator(self.seed, "order", epoch)
        if weights is None:
            order = torch.randperm(len(self.fit), generator=drawn)
        else:
            order = torch.multinomial(weights.cpu(), len(self.fit), replacement=True, generator=drawn)
        return batches + self.cut(order, number)

    def cut(self, order: Tensor, number: int) -> list[np.ndarray]:
        ends = [(b + 1) * self.batch_size for b in range(number)]
        if number and not self.drop_last:
            ends[-1] = len(order)
        return [order[b * self.batch_size : end].numpy() for b, end in enumerate(ends)]

    def read_batch(self, indices: np.ndarray, epoch: int, number: int) -> ImageBatch:
        """This process's share of the global batch `indices`."""
        rank, processes = distributed.rank(), distributed.world_size()
        first, stop = (len(indices) * r // processes for r in (rank, rank + 1))
        extra = bool(indices[0] >= len(self.fit))
        mine = indices[first:stop]
        source, positions = (self.extra, mine - len(self.fit)) if extra else (self.fit, mine)
        assert source is not None
        draws = Draws(key=(self.seed, epoch, number), first=first, total=len(indices))
        companions = None if extra else self.method.companions(torch.from_numpy(indices), draws)
        if companions is None:
            companions = torch.empty(len(indices), 0, dtype=torch.int64)
        companions = companions[first:stop]
        beside = self.read(source, companions.T.flatten().numpy())
        beside = beside.unflatten(0, (companions.shape[1], len(mine)))
        return ImageBatch(self.read(source, positions), torch.from_numpy(mine), draws, extra, companions, beside)

    @property
    def method(self) -> Any:
        """The method in training, of which this class knows what it wants to see: weights and companions."""
        assert self.trainer is not None
        return self.trainer.lightning_module

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> TrainBatch:
        """The views of a batch, made on the device."""
        draws = batch.draws
        rows = draws.rows(len(batch.images))
        views = self.views(batch.images, draws.generator("views"), rows=rows, total=draws.total)
        generator = draws.generator("views of companions")
        beside = [
            self.views.companion(images, generator, rows=rows, total=draws.total) for images in batch.companion_images
        ]
        dtype = self.method.weight_dtype
        return TrainBatch(
            tuple(v.to(dtype) for v in views),
            batch.indices,
            draws,
            batch.extra,
            tuple(v.to(dtype) for v in beside),
            batch.companions,
        )

    # The clean pass ---------------------------------------------------------------------------------------------------

    def clean_batches(self, source: ImageSource, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """This process's share of `source`, in order, as clean images (N, channels, H, W) on `device`.

        Shares are contiguous and come in rank order, so that gathered features are in the order of the data set.
        """
        rank, processes = distributed.rank(), distributed.world_size()
        first, stop = (len(source) * r // processes for r in (rank, rank + 1))
        starts = range(first, stop, self.clean_batch_size)
        reads = (lambda a=a: self.read(source, np.arange(a, min(a + self.clean_batch_size, stop))) for a in starts)
        for images in read_ahead(reads):
            yield self.views.clean(images.to(device, non_blocking=True))


class TrainLoader:
    """The batches of the trainer's present epoch, from where it stands in it: a resumed epoch goes on in the middle."""

    def __init__(self, datamodule: ImageDataModule) -> None:
        self.datamodule = datamodule

    def __len__(self) -> int:
        return self.datamodule.batches_per_epoch

    def __iter__(self) -> Iterator[ImageBatch]:
        # Runs at the first batch that is asked for: after the E-step, whose pseudo-labels may weigh the sampling.
        trainer = self.datamodule.trainer
        assert trainer is not None
        method = self.datamodule.method
        epoch, done = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready
        batches = self.datamodule.epoch_indices(epoch, method.sampling_weights())
        yield from read_ahead(
            lambda b=b, n=n: self.datamodule.read_batch(b, epoch, n) for n, b in enumerate(batches) if n >= done
        )

    # Lightning takes a loader with these for one that can go on in the middle of an epoch, as this one does by itself.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def read_ahead(reads: Iterator[Any] | Any) -> Iterator[Any]:
    """The results of calls in order, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as pool:
        pending: Future | None = None
        for read in reads:
            following = pool.submit(read)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
