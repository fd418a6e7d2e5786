"""The DataModule: stored images become the batches of training, with random views, and those of the clean pass.

Everything random about the data hangs on a random key, which begins with the seed of the run and holds one of the names
listed below. The order of the images hangs on (seed, name, epoch); the views of a batch on (seed, epoch, batch number,
name), with the names of deepclust/views/random_draws.py.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from deepclust.batch import Draws, ImageBatch, PaddedImages, TrainBatch
from deepclust.datasets.batch_checks import check_batch_statistics, check_views_of_whole_images
from deepclust.datasets.graphs import GraphSource
from deepclust.datasets.image_sources import ImageSource, count_bytes, keep_on_device
from deepclust.engine import distributed
from deepclust.engine.epoch_length import count_batches_taken
from deepclust.engine.plurals import format_count
from deepclust.engine.randomness import make_generator
from deepclust.errors import InputError
from deepclust.number_types import AnyInt, NonNegativeFloat, PositiveInt
from deepclust.views.multiview import MultiView
from deepclust.views.random_draws import COMPANION_VIEWS_KEY, VIEWS_KEY

# Names in the random keys. Changing one changes the random numbers and thus all results.
FIT_ORDER_KEY = "order"
EXTRA_ORDER_KEY = "order of extra images"


class ImageDataModule(LightningDataModule):
    """Makes batches of views, on the device, of the images in `fit` and `extra`. It holds no labels.

    A pass of the data is one over `extra`, if the method uses it in this epoch, followed by one over `fit`. It takes
    every image once, in an order that depends on the seed and the epoch only. If the method gives `sampling_weights`,
    the images of `fit` are drawn with these weights instead. If its attribute `shuffle` is false, they come in the
    order of the data set.

    An epoch is a pass of the data. Where gradients are accumulated over A batches, accumulation runs over the end of a
    pass: an epoch then ends with the optimiser step in which the pass ends, up to A - 1 batches later, and the next one
    begins there. Passes shorter than A batches are epochs of a single, smaller step.

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
        InputError: if the batch is larger than the data set or does not divide among the processes, or the views do not
            bring images in their own shapes to one size.
    """

    def __init__(
        self,
        *,
        fit: ImageSource,
        extra: ImageSource | None,
        views: MultiView,
        batch_size: PositiveInt,
        clean_batch_size: PositiveInt,
        drop_last: bool,
        resident_bytes: NonNegativeFloat,
        seed: AnyInt,
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
        self.resident_sources: dict[ImageSource, ImageSource] = {}
        self.seconds_waited = 0.0  # for batches of training that were not read yet when they were needed
        self.uses_pinned_memory = False  # page-locked memory, which a GPU reads by itself
        if batch_size > len(fit) and drop_last:
            raise InputError(
                f"batch_size is {batch_size} and the data set holds {format_count(len(fit), 'image')}",
                expected="a batch no larger than the data set",
                do=f"set batch_size={len(fit)} or less",
            )
        for source in (fit, extra):
            if source is not None:
                check_views_of_whole_images(views, source)

    @property
    def edges(self) -> np.ndarray | None:
        """The edges (2, E) of the graph whose nodes the images of `fit` are; None if the data set is no graph."""
        return self.fit.edges if isinstance(self.fit, GraphSource) else None

    # Training ---------------------------------------------------------------------------------------------------------

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches in the current pass of the data, including those of `extra`."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        return self.count_batches_before(epoch + 1) - self.count_batches_before(epoch)

    def uses_extra(self, epoch: int) -> bool:
        """Return whether there are extra images and the method uses them in this epoch."""
        return self.extra is not None and (self.trainer is None or self.method.uses_extra_images(epoch))

    def count_batches_before(self, epoch: int) -> int:
        """Return the number of batches in all passes before that of `epoch` (from 0)."""
        num_extra_passes = sum(self.uses_extra(e) for e in range(epoch)) if self.extra is not None else 0
        return epoch * self.count_batches(self.fit) + num_extra_passes * self.count_batches(self.extra)

    def first_batch_of_epoch(self, epoch: int) -> int:
        """Return at which batch, counted from 0 over all passes, an epoch begins; see the class about accumulation."""
        num_accumulated = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        first = self.count_batches_before(epoch)
        if self.count_batches(self.fit) < num_accumulated:
            return first
        return -(-first // num_accumulated) * num_accumulated

    def count_batches_of_epoch(self, epoch: int) -> int:
        """Return the number of batches from the beginning of an epoch to that of the next one."""
        return self.first_batch_of_epoch(epoch + 1) - self.first_batch_of_epoch(epoch)

    def count_batches(self, source: ImageSource | None) -> int:
        """Return the number of batches in one pass over `source`."""
        num_full, rest = divmod(0 if source is None else len(source), self.batch_size)
        # Batch statistics of fewer images would be too noisy, and every process needs some images.
        is_rest_a_batch = rest >= max(2, self.batch_size / 8) or (num_full == 0 and rest > 0)
        return num_full + (is_rest_a_batch and not self.drop_last)

    def batch_sizes(self, source: ImageSource | None) -> list[int]:
        """Return the sizes that the batches of one pass over `source` have: the usual one, and that of the last."""
        num_batches = self.count_batches(source)
        last = 0 if source is None or num_batches == 0 else len(source) - (num_batches - 1) * self.batch_size
        sizes = [self.batch_size] * (num_batches > 1 or self.drop_last) + [last] * (not self.drop_last)
        return sizes if num_batches else []

    def setup(self, stage: str) -> None:
        num_processes = distributed.world_size()
        if self.batch_size % num_processes:
            raise InputError(
                f"batch_size is {self.batch_size} on {num_processes} processes",
                expected="a global batch that divides among the processes",
                do=f"set batch_size={self.batch_size // num_processes * num_processes or num_processes}",
            )
        assert self.trainer is not None
        if self.trainer.max_epochs != 0:
            check_batch_statistics(
                self.method,
                [*self.batch_sizes(self.fit), *self.batch_sizes(self.extra)],
                batch_size=self.batch_size,
                num_processes=num_processes,
            )
        num_batches = self.batches_per_epoch
        if count_batches_taken(self.trainer, num_batches) < 1:
            raise InputError(
                f"trainer.limit_train_batches leaves less than one of the {num_batches} batches of an epoch",
                expected="at least one",
                do="set trainer.limit_train_batches=1, or trainer.max_epochs=0 to train nothing",
            )
        if self.extra is not None or self.trainer.accumulate_grad_batches > 1:
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # epochs differ in length
        device = self.trainer.strategy.root_device
        self.uses_pinned_memory = device.type == "cuda"
        bytes_left = self.resident_bytes
        for source in (self.fit, self.extra):
            if source is not None and (size := count_bytes(source)) <= bytes_left:
                self.resident_sources[source] = keep_on_device(source, device)
                bytes_left -= size

    def teardown(self, stage: str) -> None:
        self.resident_sources.clear()

    def read(self, source: ImageSource, indices: np.ndarray) -> Tensor | PaddedImages:
        """Return the images (N, channels, H, W) at `indices`; they are on the device if the source is kept there."""
        images = self.resident_sources.get(source, source).read(indices)
        return images.pin_memory() if self.uses_pinned_memory and images.is_cpu else images

    def train_dataloader(self) -> "TrainLoader":
        return TrainLoader(self)

    def draw_epoch_batches(self, epoch: int, weights: Tensor | None, *, shuffle: bool = True) -> list[np.ndarray]:
        """Return the global batches of the pass that belongs to an epoch, as arrays of indices.

        The batches of `extra` come first; the indices of its images begin at len(fit). Without `weights` and without
        `shuffle`, the images of `fit` keep their order.
        """
        batches = []
        if self.extra is not None and self.uses_extra(epoch):
            order = torch.randperm(len(self.extra), generator=make_generator(self.seed, EXTRA_ORDER_KEY, epoch))
            batches += self.split_into_batches(order + len(self.fit), self.count_batches(self.extra))
        generator = make_generator(self.seed, FIT_ORDER_KEY, epoch)
        if weights is not None:
            order = torch.multinomial(weights.cpu(), len(self.fit), replacement=True, generator=generator)
        elif shuffle:
            order = torch.randperm(len(self.fit), generator=generator)
        else:
            order = torch.arange(len(self.fit))
        return batches + self.split_into_batches(order, self.count_batches(self.fit))

    def list_epoch_batches(
        self, epoch: int, weights: Tensor | None, *, shuffle: bool = True
    ) -> Iterator[tuple[np.ndarray, int, int]]:
        """Yield the global batches of an epoch: indices, the epoch to whose pass they belong, and the number in it."""
        first, stop = self.first_batch_of_epoch(epoch), self.first_batch_of_epoch(epoch + 1)
        for pass_epoch in (epoch, epoch + 1):
            begin = self.count_batches_before(pass_epoch)
            if begin < stop:
                for number, indices in enumerate(self.draw_epoch_batches(pass_epoch, weights, shuffle=shuffle)):
                    if first <= begin + number < stop:
                        yield indices, pass_epoch, number

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
        read_companions = self.read(source, companions.T.flatten().numpy())
        companion_images: Tensor | list[PaddedImages]
        if isinstance(read_companions, PaddedImages):
            starts = range(0, len(read_companions), max(1, len(own_indices)))
            companion_images = [read_companions[start : start + len(own_indices)] for start in starts]
        else:
            companion_images = read_companions.unflatten(0, (companions.shape[1], len(own_indices)))
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
        trainer = self.datamodule.trainer
        assert trainer is not None
        return self.datamodule.count_batches_of_epoch(trainer.current_epoch)

    def __iter__(self) -> Iterator[ImageBatch]:
        # This is a Python generator: it starts when the first batch is asked for. By then the E-step is done, whose
        # pseudo-labels may set the sampling weights.
        trainer = self.datamodule.trainer
        assert trainer is not None
        method = self.datamodule.method
        epoch, num_done = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready
        batches = self.datamodule.list_epoch_batches(epoch, method.sampling_weights(), shuffle=method.shuffle)
        if trainer.overfit_batches:  # type: ignore[attr-defined]  # the same images in every epoch
            same = self.datamodule.list_epoch_batches(0, None, shuffle=method.shuffle)
            batches = ((indices, epoch, number) for indices, _, number in same)
        reads = (partial(self.datamodule.read_batch, *batch) for batch in islice(batches, num_done, None))
        began_at = time.perf_counter()
        for batch in prefetch(reads):
            self.datamodule.seconds_waited += time.perf_counter() - began_at
            yield batch
            began_at = time.perf_counter()

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
