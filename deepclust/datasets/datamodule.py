"""The DataModule: stored images become the batches of training, with random views, and those of the clean pass.

Everything random about the data hangs on a random key, which begins with the seed of the run and holds one of the names
listed below. The order of the images hangs on (seed, name, epoch); the views of a batch on (seed, epoch, batch number,
name), with the names of deepclust/views/random_draws.py.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from deepclust.batch import Draws, ImageBatch, TrainBatch
from deepclust.datasets.image_sources import ImageSource, ResidentSource
from deepclust.engine import distributed
from deepclust.engine.randomness import make_generator
from deepclust.errors import InputError
from deepclust.views.multiview import MultiView
from deepclust.views.random_draws import COMPANION_VIEWS_KEY, VIEWS_KEY

# Names in the random keys. Changing one changes the random numbers and thus all results.
FIT_ORDER_KEY = "order"
EXTRA_ORDER_KEY = "order of extra images"


class ImageDataModule(LightningDataModule):
    """Makes batches of views, on the device, of the images in `fit` and `extra`. It holds no labels.

    An epoch is one pass over `extra`, if given, followed by one over `fit`. Each pass takes every image once, in an
    order that depends on the seed and the epoch only. If the method gives `sampling_weights`, the images of `fit` are
    drawn with these weights instead.

    Args:
        fit: the images that are trained on and clustered.
        extra: further images that only help the representation; None if there are none.
        views: makes the views of images.
        batch_size: images in a global batch. Each process takes its share, so that a batch is the same on any number
            of processes.
        clean_batch_size: images in a batch of the clean pass, on each process.
        drop_last: whether images that do not fill a batch are left out. Otherwise they make a batch of their own or,
            if they are fewer than an eighth of a batch, join the batch before.
        resident_bytes: sources up to this size in total are kept on the device during training.
        seed: seed of the run.

    Raises:
        InputError: if the batch is larger than the data set or does not divide among the processes.
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
        self.resident_sources: dict[ImageSource, ResidentSource] = {}
        self.uses_pinned_memory = False  # page-locked memory, which a GPU reads by itself
        if batch_size > len(fit) and drop_last:
            raise InputError(
                f"batch_size is {batch_size} and the data set holds {len(fit)} images",
                expected="a batch no larger than the data set",
                do=f"set batch_size={len(fit)} or less",
            )

    # Training ---------------------------------------------------------------------------------------------------------

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches in an epoch, including those of `extra`."""
        return self.count_batches(self.fit) + self.count_batches(self.extra)

    def count_batches(self, source: ImageSource | None) -> int:
        """Return the number of batches in one pass over `source`."""
        num_full, rest = divmod(0 if source is None else len(source), self.batch_size)
        # Batch statistics of fewer images would be too noisy, and every process needs some images.
        is_rest_a_batch = rest >= max(2, self.batch_size / 8) or (num_full == 0 and rest > 0)
        return num_full + (is_rest_a_batch and not self.drop_last)

    def setup(self, stage: str) -> None:
        num_processes = distributed.world_size()
        if self.batch_size % num_processes:
            raise InputError(
                f"batch_size is {self.batch_size} on {num_processes} processes",
                expected="a global batch that divides among the processes",
                do=f"set batch_size={self.batch_size // num_processes * num_processes or num_processes}",
            )
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        self.uses_pinned_memory = device.type == "cuda"
        bytes_left = self.resident_bytes
        for source in (self.fit, self.extra):
            if source is not None and (size := source.read(np.arange(1)).nbytes * len(source)) <= bytes_left:
                self.resident_sources[source] = ResidentSource(source, device)
                bytes_left -= size

    def teardown(self, stage: str) -> None:
        self.resident_sources.clear()

    def read(self, source: ImageSource, indices: np.ndarray) -> Tensor:
        """Return the images (N, channels, H, W) at `indices`; they are on the device if the source is kept there."""
        images = self.resident_sources.get(source, source).read(indices)
        return images.pin_memory() if self.uses_pinned_memory and images.is_cpu else images

    def train_dataloader(self) -> "TrainLoader":
        return TrainLoader(self)

    def draw_epoch_batches(self, epoch: int, weights: Tensor | None) -> list[np.ndarray]:
        """Return the global batches of an epoch as arrays of indices.

        The batches of `extra` come first; the indices of its images begin at len(fit).
        """
        batches = []
        if self.extra is not None:
            order = torch.randperm(len(self.extra), generator=make_generator(self.seed, EXTRA_ORDER_KEY, epoch))
            batches += self.split_into_batches(order + len(self.fit), self.count_batches(self.extra))
        generator = make_generator(self.seed, FIT_ORDER_KEY, epoch)
        if weights is None:
            order = torch.randperm(len(self.fit), generator=generator)
        else:
            order = torch.multinomial(weights.cpu(), len(self.fit), replacement=True, generator=generator)
        return batches + self.split_into_batches(order, self.count_batches(self.fit))

    def split_into_batches(self, order: Tensor, num_batches: int) -> list[np.ndarray]:
        """Return the indices `order` (M,) in batches; without `drop_last`, the last one takes all that remain."""
        ends = [(b + 1) * self.batch_size for b in range(num_batches)]
        if num_batches and not self.drop_last:
            ends[-1] = len(order)
        return [order[b * self.batch_size : end].numpy() for b, end in enumerate(ends)]

    def read_batch(self, indices: np.ndarray, epoch: int, batch_number: int) -> ImageBatch:
        """Read this process's share of the global batch `indices`, which is batch `batch_number` of the epoch."""
        rank, num_processes = distributed.rank(), distributed.world_size()
        first, stop = (len(indices) * r // num_processes for r in (rank, rank + 1))
        is_extra = bool(indices[0] >= len(self.fit))
        own_indices = indices[first:stop]
        source, positions = (self.extra, own_indices - len(self.fit)) if is_extra else (self.fit, own_indices)
        assert source is not None
        draws = Draws(key=(self.seed, epoch, batch_number), first_row=first, global_batch_size=len(indices))
        companions = None if is_extra else self.method.companions(torch.from_numpy(indices), draws)
        if companions is None:
            companions = torch.empty(len(indices), 0, dtype=torch.int64)
        companions = companions[first:stop]
        companion_images = self.read(source, companions.T.flatten().numpy())
        companion_images = companion_images.unflatten(0, (companions.shape[1], len(own_indices)))
        images = self.read(source, positions)
        return ImageBatch(images, torch.from_numpy(own_indices), draws, is_extra, companions, companion_images)

    @property
    def method(self) -> Any:
        """The method in training, which is asked for its sampling weights and companions."""
        assert self.trainer is not None
        return self.trainer.lightning_module

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> TrainBatch:
        """Make the random views of a batch, on the device."""
        draws = batch.draws
        rows, global_batch_size = draws.local_rows(len(batch.images)), draws.global_batch_size
        generator = draws.make_generator(VIEWS_KEY)
        views = self.views(batch.images, generator, rows=rows, global_batch_size=global_batch_size)
        generator = draws.make_generator(COMPANION_VIEWS_KEY)
        companion_views = [
            self.views.companion_view(images, generator, rows=rows, global_batch_size=global_batch_size)
            for images in batch.companion_images
        ]
        dtype = self.method.weight_dtype
        return TrainBatch(
            tuple(view.to(dtype) for view in views),
            batch.indices,
            draws,
            batch.extra,
            tuple(view.to(dtype) for view in companion_views),
            batch.companions,
        )

    # The clean pass ---------------------------------------------------------------------------------------------------

    def clean_batches(self, source: ImageSource, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Yield this process's share of `source` in order, as clean views (N, channels, h, w) on `device`.

        The shares are contiguous and follow the ranks, so that gathered features are in the order of the data set.
        """
        rank, num_processes = distributed.rank(), distributed.world_size()
        first, stop = (len(source) * r // num_processes for r in (rank, rank + 1))
        size = self.clean_batch_size
        starts = range(first, stop, size)
        reads = (lambda start=start: self.read(source, np.arange(start, min(start + size, stop))) for start in starts)
        for images in prefetch(reads):
            yield self.views.clean(images.to(device, non_blocking=True))


class TrainLoader:
    """The batches of the trainer's current epoch that are still to be done; a resumed epoch continues in its middle."""

    def __init__(self, datamodule: ImageDataModule) -> None:
        self.datamodule = datamodule

    def __len__(self) -> int:
        return self.datamodule.batches_per_epoch

    def __iter__(self) -> Iterator[ImageBatch]:
        # This is a Python generator: it starts when the first batch is asked for. By then the E-step is done, whose
        # pseudo-labels may set the sampling weights.
        trainer = self.datamodule.trainer
        assert trainer is not None
        method = self.datamodule.method
        epoch, num_done = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready
        batches = self.datamodule.draw_epoch_batches(epoch, method.sampling_weights())
        yield from prefetch(
            partial(self.datamodule.read_batch, indices, epoch, number)
            for number, indices in enumerate(batches)
            if number >= num_done
        )

    # With these two methods, Lightning takes the loader for one that can continue in the middle of an epoch. Their
    # state is empty because __iter__ asks the trainer how many batches are done.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def prefetch(reads: Iterable[Callable[[], Any]]) -> Iterator[Any]:
    """Call the functions `reads` and yield their results in order; the next one runs in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        pending: Future | None = None
        for read in reads:
            next_pending = pool.submit(read)
            if pending is not None:
                yield pending.result()
            pending = next_pending
        if pending is not None:
            yield pending.result()
