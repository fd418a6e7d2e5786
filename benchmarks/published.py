"""ProPos as the published codes of the field train it: images one by one through PIL, in the workers of a loader."""

import time

import torch
import torchvision.transforms as T
from by_hand import ProPosByHand
from measure import wait
from step import Bare, Work
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deepclust.datasets.image_sources import ImageSource


class TwoViews(Dataset):
    """Two augmented views of each image, made as the codes of the field make them."""

    def __init__(
        self, source: ImageSource, order: list[int], *, size: int, mean: list[float], std: list[float]
    ) -> None:
        held = sorted(set(order))
        pictures = map(T.functional.to_pil_image, source.read(torch.tensor(held).numpy()))
        self.images = dict(zip(held, pictures, strict=True))
        self.indices = order
        colour = [] if source.shape[2] == 1 else [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)]
        grey = [] if source.shape[2] == 1 else [T.RandomGrayscale(0.2)]
        flip = [] if source.shape[2] == 1 else [T.RandomHorizontalFlip()]
        self.transform = T.Compose(
            [T.RandomResizedCrop(size), *flip, *colour, *grey, T.ToTensor(), T.Normalize(mean, std)]
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
        index = self.indices[position]
        image = self.images[index]
        return self.transform(image), self.transform(image), index


class Published(Bare):
    """The published way, with the first weights of our method."""

    def __init__(self, work: Work, device: torch.device, batches: int, workers: int) -> None:
        work.method.to(memory_format=torch.contiguous_format)
        super().__init__(work, device, batches)
        self.plain = ProPosByHand(self.method, steps_per_epoch=self.method.steps_per_epoch)  # type: ignore[arg-type]
        cfg, fit = work.cfg, work.datamodule.fit
        channels = fit.shape[2]
        scale = {name: list(cfg.dataset[name] or [0.5] * channels) for name in ("mean", "std")}
        # Each worker makes a batch; the first of all come at once, and late.
        self.lead = max(workers, 1)
        self.timed = -(-batches // self.lead) * self.lead
        needed = (self.lead + self.timed) * cfg.batch_size
        order = torch.randperm(len(fit)).repeat(-(-needed // len(fit)))[:needed].tolist()
        views = TwoViews(fit, order, size=cfg.dataset.image_size, **scale)
        self.loader = DataLoader(
            views,
            batch_size=cfg.batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            drop_last=True,
        )

    def epoch(self) -> float:
        """Seconds of `batches` steps, by the rate of those that are timed."""
        for number, (a, b, indices) in enumerate(self.loader, 1):
            a, b = (view.to(self.device, non_blocking=True) for view in (a, b))
            self.step_on(a, b, indices.to(self.device, non_blocking=True))
            if number == self.lead:
                wait(self.device)
                start = time.perf_counter()
        wait(self.device)
        return (time.perf_counter() - start) / self.timed * self.batches

    def step_on(self, a: Tensor, b: Tensor, indices: Tensor) -> None:
        like = self.method
        noise = 1e-3 * torch.randn(2, len(a), like.pseudo_labels.centroids.shape[1], device=self.device)  # type: ignore
        self.plain.step(a, b, indices % like.num_clusters, (noise[0], noise[1]), scatter=True)
