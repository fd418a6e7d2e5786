"""ProPos as the published codes train it, beside ours: the same batch, network, device and mathematics.

    python benchmarks/baseline.py [--batches 8] [--rounds 5] [--workers N] [--code DIR] [OVERRIDES of deepclust train]

The published way: each image becomes a PIL image in a worker of a loader, which augments it twice, image after image;
32-bit floats, planar memory, one pass through the networks for each view (where the recipe takes one pass for both, it
does too). Ours: `deepclust train` as it is. Both in turns, an epoch of `--batches` batches each, without the E-step;
images a second are medians over the rounds, and so is their ratio. The loader's workers are started before the clock.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torchvision.transforms as T
from by_hand import ProPosByHand
from measure import options, ratio, save, table, wait
from step import Bare, Turns, Work, configuration
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deepclust.datasets.source import ImageSource
from deepclust.train import quiet_lightning


class TwoViews(Dataset):
    """Two augmented views of each image, made as the codes of the field make them."""

    def __init__(
        self, source: ImageSource, order: list[int], *, size: int, mean: list[float], std: list[float]
    ) -> None:
        self.images = [T.functional.to_pil_image(image) for image in source.read(torch.tensor(order).numpy())]
        self.indices = order
        colour = [] if source.shape[2] == 1 else [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)]
        grey = [] if source.shape[2] == 1 else [T.RandomGrayscale(0.2)]
        flip = [] if source.shape[2] == 1 else [T.RandomHorizontalFlip()]
        self.transform = T.Compose(
            [T.RandomResizedCrop(size), *flip, *colour, *grey, T.ToTensor(), T.Normalize(mean, std)]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
        image = self.images[position]
        return self.transform(image), self.transform(image), self.indices[position]


class Published(Bare):
    """The published way, with the first weights of our method."""

    def __init__(self, work: Work, device: torch.device, batches: int, workers: int) -> None:
        work.method.to(memory_format=torch.contiguous_format)
        super().__init__(work, device, batches)
        self.plain = ProPosByHand(self.method, steps_per_epoch=self.method.steps_per_epoch)  # type: ignore[arg-type]
        cfg, fit = work.cfg, work.datamodule.fit
        channels = fit.shape[2]
        scale = {name: list(cfg.dataset[name] or [0.5] * channels) for name in ("mean", "std")}
        order = torch.randperm(len(fit))[: batches * cfg.batch_size].tolist()
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
        wait(self.device)
        start = time.perf_counter()
        for a, b, indices in self.loader:
            a, b = (view.to(self.device, non_blocking=True) for view in (a, b))
            self.step_on(a, b, indices.to(self.device, non_blocking=True))
        wait(self.device)
        return time.perf_counter() - start

    def step_on(self, a: Tensor, b: Tensor, indices: Tensor) -> None:
        like = self.method
        noise = 1e-3 * torch.randn(2, len(a), like.pseudo_labels.centroids.shape[1], device=self.device)  # type: ignore
        self.plain.step(a, b, indices % like.num_clusters, (noise[0], noise[1]), scatter=True)


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--batches", type=int, default=8, help="of an epoch")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the published way's loader")
    parser.add_argument("--code", type=Path, help="a copy of the authors' code, timed as well (authors.py)")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    quiet_lightning()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cfg = configuration("propos", given.overrides, given.batches, given.rounds + 1, folder)
        plain = configuration(
            "propos",
            [
                *(*given.overrides, "hardware.precision=32-true", "hardware.channels_last=false"),
                *("hardware.compile=null", "hardware.graphs=false", "hardware.fused_optimizer=false"),
            ],
            *(given.batches, given.rounds + 1, folder / "published"),
        )
        work = Work(cfg)
        others: dict[str, Bare] = {"published way": Published(Work(plain), device, given.batches, given.workers)}
        if given.code is not None:
            from authors import Authors

            others["authors' code"] = Authors(Work(plain), device, given.batches, given.workers, given.code)
        turns = Turns(others, given.batches)
        work.trainer(folder, turns).fit(work.method, work.datamodule)
    seconds = turns.seconds
    speed = {who: cfg.batch_size / statistics.median(taken) for who, taken in seconds.items()}
    times = {who: ratio(taken, seconds["framework"]) for who, taken in seconds.items()}
    weights = sum(p.numel() for p in work.method.backbone.parameters())
    figures = {
        "dataset": cfg.dataset.name,
        "backbone": cfg.names.backbone,
        "weights": weights,
        "workers": given.workers,
    }
    figures |= {"batch_size": cfg.batch_size, "images_per_second": speed, "times": times, "rounds": dict(seconds)}
    save(figures, __file__, given.out)
    table(["", "images/s", "deepclust is so many times as fast"], [[who, speed[who], times[who]] for who in speed])


if __name__ == "__main__":
    main()
