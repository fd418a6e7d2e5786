"""ProPos's two views, images a second and core: batched (ours) against torchvision, image after image.

    python benchmarks/views.py [--images 256] [--size 32] [--rounds 9] [--out views.json]

Both do the recipe of conf/views/propos.yaml and normalise, on one thread, in turns; medians over the rounds.
Ours starts from a uint8 tensor, torchvision from PIL images that are decoded already; both end with a float
tensor per view. kornia takes part where it is installed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision.transforms as T
from hydra import compose, initialize_config_module
from torch import Tensor

from deepclust.config import build
from deepclust.randomness import generator
from deepclust.views.multiview import MultiView

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
Views = Callable[[], tuple[Tensor, ...]]


def ours(images: Tensor) -> Views:
    """Our two views of uint8 images (N, 3, H, W)."""
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        overrides = [f"+dataset.image_size={images.shape[-1]}"]
        pipelines = build(compose("views/propos", overrides=overrides).views)
    views = MultiView(pipelines=pipelines, names=["weak", "weak"], mean=MEAN, std=STD)
    draws, n = generator("benchmark"), len(images)
    return lambda: views(images, draws, rows=slice(0, n), total=n)


def torchvision_on_pil(images: Tensor) -> Views:
    """torchvision's two views of the same images, one PIL image after the other."""
    pictures = [T.functional.to_pil_image(image) for image in images]
    transform = T.Compose(
        [
            T.RandomResizedCrop(images.shape[-1]),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )
    return lambda: tuple(torch.stack([transform(picture) for picture in pictures]) for _ in range(2))


def kornia_batched(images: Tensor) -> Views:
    """kornia's two views of the same images, batched."""
    import kornia.augmentation as K

    size = images.shape[-1]
    transform = torch.nn.Sequential(
        K.RandomResizedCrop((size, size), scale=(0.08, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
    return lambda: tuple(transform(images.float() / 255) for _ in range(2))


def timed(views: Views) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    views()
    return time.perf_counter() - start


def processor() -> str:
    """The name of this machine's processor, as far as the system tells."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=256, help="in a batch")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--rounds", type=int, default=9, help="of which the median is taken")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()

    torch.set_num_threads(1)
    shape = (options.images, options.size, options.size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator("pixels")).permute(0, 3, 1, 2)
    peers = {"deepclust": ours(images), "torchvision": torchvision_on_pil(images)}
    packages = ["torch", "torchvision", "pillow"]
    if importlib.util.find_spec("kornia"):
        peers["kornia"] = kornia_batched(images)
        packages.append("kornia")

    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for views in peers.values():  # once unmeasured
        views()
    for _ in range(options.rounds):
        for name, views in peers.items():
            seconds[name].append(timed(views))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    figures = {
        "images": options.images,
        "size": options.size,
        "views": 2,
        "rounds": options.rounds,
        "seconds_per_batch": median,
        "images_per_second": {name: options.images / value for name, value in median.items()},
        "times_torchvision": {name: median["torchvision"] / value for name, value in median.items()},
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
    }
    for name, value in median.items():
        print(
            f"{name:12s} {1e3 * value:8.1f} ms a batch of {options.images}, "
            f"{options.images / value:8.0f} images/s, {median['torchvision'] / value:5.1f} times torchvision"
        )
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
