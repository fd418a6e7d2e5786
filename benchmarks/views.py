"""The two views of ProPos in images a second: ours in a batch, against torchvision image by image and against kornia.

    python benchmarks/views.py [--images 256] [--size 32] [--rounds 9]

All sides make the views of conf/views/propos.yaml and normalise them, on one thread. They take turns, and figures are
medians over the rounds. Ours starts from a uint8 tensor and torchvision from PIL images that are already decoded; both
end with one float tensor for each view. kornia is timed where it is installed. Where there is a GPU, ours and kornia's
are timed on it as well.
"""

import importlib.util
import statistics
from collections.abc import Callable

import torch
import torchvision.transforms as T
from hydra import compose, initialize_config_module
from measure import make_argument_parser, median_ratio, print_table, save_figures, time_interleaved
from torch import Tensor

from deepclust.config.build import build
from deepclust.engine.randomness import make_generator
from deepclust.views.multiview import MultiView

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
MakeViews = Callable[[], tuple[Tensor, ...]]


def deepclust_views(images: Tensor) -> MakeViews:
    """Return a function that makes our two views of uint8 images (N, 3, H, W)."""
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        overrides = [f"+dataset.image_size={images.shape[-1]}"]
        pipelines = build(compose("views/propos", overrides=overrides).views)
    views = MultiView(pipelines=pipelines, names=["weak", "weak"], mean=MEAN, std=STD)
    generator, n = make_generator("benchmark"), len(images)
    return lambda: views(images, generator, rows=slice(0, n), global_batch_size=n)


def torchvision_views(images: Tensor) -> MakeViews:
    """Return a function that makes torchvision's two views of the same images, PIL image by PIL image."""
    pil_images = [T.functional.to_pil_image(image) for image in images]
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
    return lambda: tuple(torch.stack([transform(image) for image in pil_images]) for _ in range(2))


def kornia_views(images: Tensor) -> MakeViews:
    """Return a function that makes kornia's two views of the same images, in a batch."""
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
    parser = make_argument_parser(__doc__, rounds=9)
    parser.add_argument("--images", type=int, default=256, help="number of images in the batch")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = (args.images, args.size, args.size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=make_generator("pixels")).permute(0, 3, 1, 2)
    has_kornia = importlib.util.find_spec("kornia") is not None
    contestants = {"deepclust": deepclust_views(images), "torchvision": torchvision_views(images)}
    if torch.cuda.is_available():
        contestants["deepclust on the GPU"] = deepclust_views(images.cuda())
        if has_kornia:
            contestants["kornia on the GPU"] = kornia_views(images.cuda())
    if has_kornia:
        contestants["kornia"] = kornia_views(images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = time_interleaved(contestants, rounds=args.rounds, device=device)
    images_per_second = {name: args.images / statistics.median(rounds) for name, rounds in seconds.items()}
    times = {name: median_ratio(seconds["torchvision"], rounds) for name, rounds in seconds.items()}
    figures = {"images": args.images, "size": args.size, "views": 2, "images_per_second": images_per_second}
    save_figures(figures | {"times_torchvision": times, "rounds": seconds}, __file__, args.out)
    print_table(
        ["two views, one thread", "images/s", "times torchvision"],
        [[name, images_per_second[name], times[name]] for name in contestants],
    )


if __name__ == "__main__":
    main()
