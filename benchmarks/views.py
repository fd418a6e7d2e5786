"""ProPos's two views, images a second and core: batched (ours) against torchvision, image after image.

    python benchmarks/views.py [--images 256] [--size 32] [--rounds 9]

Both do the recipe of conf/views/propos.yaml and normalise, on one thread, in turns; medians over the rounds.
Ours starts from a uint8 tensor, torchvision from PIL images that are decoded already; both end with a float
tensor per view. kornia takes part where it is installed; on a GPU, ours and kornia's are timed there as well.
"""

import importlib.util
import statistics
from collections.abc import Callable

import torch
import torchvision.transforms as T
from hydra import compose, initialize_config_module
from measure import in_turns, options, ratio, save, table
from torch import Tensor

from deepclust.config.build import build
from deepclust.engine.randomness import generator
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


def main() -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("--images", type=int, default=256, help="in a batch")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shape = (given.images, given.size, given.size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator("pixels")).permute(0, 3, 1, 2)
    works: dict[str, Views] = {"deepclust": ours(images), "torchvision": torchvision_on_pil(images)}
    peers = {"kornia": kornia_batched} if importlib.util.find_spec("kornia") else {}
    if torch.cuda.is_available():
        there = images.cuda()
        works["deepclust on the GPU"] = ours(there)
        works |= {f"{name} on the GPU": peer(there) for name, peer in peers.items()}
    works |= {name: peer(images) for name, peer in peers.items()}
    seconds = in_turns(works, rounds=given.rounds, device=there.device if torch.cuda.is_available() else "cpu")
    speed = {name: given.images / statistics.median(taken) for name, taken in seconds.items()}
    times = {name: ratio(seconds["torchvision"], taken) for name, taken in seconds.items()}
    figures = {"images": given.images, "size": given.size, "views": 2, "images_per_second": speed}
    save(figures | {"times_torchvision": times, "rounds": seconds}, __file__, given.out)
    table(["two views, one thread", "images/s", "times torchvision"], [[n, speed[n], times[n]] for n in works])


if __name__ == "__main__":
    main()
