"""ProPos trained in the way of published code: PIL images, augmented one by one in the workers of a DataLoader."""

import time

import torch
import torchvision.transforms as T
from measure import synchronize
from propos_by_hand import ProPosByHand
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from training_loops import BareLoop, TrainingSetup

from deepclust.datasets.image_sources import ImageSource


class TwoViewsDataset(Dataset):
    """Two augmented views of each image, made by torchvision from PIL images."""

    def __init__(
        self, source: ImageSource, order: list[int], *, image_size: int, mean: list[float], std: list[float]
    ) -> None:
        unique_indices = sorted(set(order))
        images = map(T.functional.to_pil_image, source.read(torch.tensor(unique_indices).numpy()))
        self.images = dict(zip(unique_indices, images, strict=True))
        self.order = order
        colour_jitter = [] if source.shape[2] == 1 else [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)]
        grayscale = [] if source.shape[2] == 1 else [T.RandomGrayscale(0.2)]
        flip = [] if source.shape[2] == 1 else [T.RandomHorizontalFlip()]
        self.transform = T.Compose(
            [T.RandomResizedCrop(image_size), *flip, *colour_jitter, *grayscale, T.ToTensor(), T.Normalize(mean, std)]
        )

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
        index = self.order[position]
        image = self.images[index]
        return self.transform(image), self.transform(image), index


class PublishedWayLoop(BareLoop):
    """`ProPosByHand` on batches of `TwoViewsDataset`, with the initial weights of our method."""

    def __init__(self, setup: TrainingSetup, device: torch.device, batches: int, workers: int) -> None:
        setup.method.to(memory_format=torch.contiguous_format)
        super().__init__(setup, device, batches)
        self.propos = ProPosByHand(self.method, steps_per_epoch=self.method.steps_per_epoch)  # type: ignore[arg-type]
        cfg, fit = setup.cfg, setup.datamodule.fit
        channels = fit.shape[2]
        normalisation = {name: list(cfg.dataset[name] or [0.5] * channels) for name in ("mean", "std")}
        # Each worker makes whole batches. The first batches of all workers arrive late and together, so they are not
        # timed. After that, a multiple of the number of workers is timed.
        self.untimed_batches = max(workers, 1)
        self.timed_batches = -(-batches // self.untimed_batches) * self.untimed_batches
        num_images = (self.untimed_batches + self.timed_batches) * cfg.batch_size
        order = torch.randperm(len(fit)).repeat(-(-num_images // len(fit)))[:num_images].tolist()
        self.loader = DataLoader(
            TwoViewsDataset(fit, order, image_size=cfg.dataset.image_size, **normalisation),
            batch_size=cfg.batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            drop_last=True,
        )

    def run_epoch(self) -> float:
        """Return the seconds of `batches` steps, at the mean rate of the timed batches."""
        for number, (a, b, indices) in enumerate(self.loader, 1):
            a, b = (view.to(self.device, non_blocking=True) for view in (a, b))
            self.train_on_views(a, b, indices.to(self.device, non_blocking=True))
            if number == self.untimed_batches:
                synchronize(self.device)
                start = time.perf_counter()
        synchronize(self.device)
        return (time.perf_counter() - start) / self.timed_batches * self.batches

    def train_on_views(self, a: Tensor, b: Tensor, indices: Tensor) -> None:
        """Take one step on two views (N, C, H, W); which pseudo-labels it gets makes no difference to its time."""
        num_features = self.method.pseudo_labels.centroids.shape[1]  # type: ignore
        noise = 1e-3 * torch.randn(2, len(a), num_features, device=self.device)
        pseudo_labels = indices % self.method.num_clusters
        self.propos.step(a, b, pseudo_labels, (noise[0], noise[1]), use_scattering=True)
