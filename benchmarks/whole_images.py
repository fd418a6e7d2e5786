"""What it costs to keep whole images instead of central squares: disk, and time to decode, read and make views.

    python benchmarks/whole_images.py [--images 64] [--rounds 9]

The files are JPEGs of 500 x 375 pixels, as most of ImageNet's are: parts of the photographs that come with
scikit-learn. A quarter of them stand upright. They are stored as central squares with sides of 256 pixels, and whole
with short sides of 256 and 384. For each form the files are decoded and stored, a batch of all of them is read from the
memory-mapped arrays, and the two views of ProPos on ImageNet-10 are made of it at 224 pixels, or the one without
randomness. All forms take turns, and figures are medians over the rounds. The share of random crops that are enlarged
to 224 pixels is that of images of 4:3.
"""

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import compose_train, make_argument_parser, median_ratio, print_table, save_figures, time_interleaved
from PIL import Image
from sklearn.datasets import load_sample_images

from deepclust.batch import PaddedImages
from deepclust.config.build import build
from deepclust.datasets.array_files import open_stored_images
from deepclust.datasets.image_sources import ImageSource, count_bytes
from deepclust.datasets.one_time_conversion import from_class_folders
from deepclust.engine.randomness import make_generator
from deepclust.views.geometry import RandomResizedCrop
from deepclust.views.multiview import MultiView

FORMS = {
    "squares, 256": {"keep": "central_squares", "image_size": 256},
    "whole, 256": {"keep": "whole_images", "image_size": 256},
    "whole, 384": {"keep": "whole_images", "image_size": 384},
}
SHAPES = {"squares, 256": (256, 256), "whole, 256": (256, 341), "whole, 384": (384, 512), "the files": (375, 500)}
STEPS = ("decode", "read", "two views", "clean view")


def write_photographs(root: Path, count: int) -> None:
    """Write JPEGs of 500 x 375 pixels, every fourth of 375 x 500, into ROOT/train/class."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    folder, rng = root / "train" / "class", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        width, height = (375, 500) if number % 4 == 3 else (500, 375)
        scale = max(width / photograph.width, height / photograph.height)
        box_width, box_height = (side / scale * rng.uniform(0.6, 1) for side in (width, height))
        left, top = rng.uniform(0, photograph.width - box_width), rng.uniform(0, photograph.height - box_height)
        box = (left, top, left + box_width, top + box_height)
        photograph.resize((width, height), Image.Resampling.BICUBIC, box=box).save(folder / f"{number:04}.jpg")


def make_steps(root: Path, data: Path, form: dict, views: MultiView, count: int):
    """Return the functions of the steps by name, and the source of the stored images."""

    def decode() -> None:
        data.mkdir(exist_ok=True)
        from_class_folders(data, root=str(root), splits=["train"], classes=None, num_classes=1, channels=3, **form)

    decode()
    source: ImageSource = open_stored_images(data, ["train"], channels=3)
    images = source.read(np.arange(count))
    generator = make_generator("benchmark")
    return source, {
        "decode": decode,
        "read": lambda: source.read(np.arange(count)),
        "two views": lambda: views(images, generator, rows=slice(0, count), global_batch_size=count),
        "clean view": lambda: views.clean(images),
    }


def count_enlarged(shape: tuple[int, int], draws: int = 10_000) -> float:
    """Return the share of random crops, with torchvision's defaults, that have fewer than 224 x 224 pixels."""
    crop = RandomResizedCrop(size=224, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    boxes = crop.boxes(crop.draw(draws, make_generator("crops")), *shape)
    return float((boxes[:, 2:].prod(1) < 224 * 224).float().mean())


def main() -> None:
    parser = make_argument_parser(__doc__, rounds=9)
    parser.add_argument("--images", type=int, default=64, help="number of files, which make one batch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    overrides = ["method=propos", "dataset=imagenet10", "backbone=resnet34", "views=propos_blur"]
    views: MultiView = build(compose_train(*overrides).multi_view)
    figures: dict = {"images": args.images, "bytes_per_image": {}, "padded_bytes_per_image": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "files", args.images)
        steps: dict = {step: {} for step in STEPS}
        for name, form in FORMS.items():
            data = Path(folder) / name
            source, functions = make_steps(Path(folder) / "files", data, form, views, args.images)
            batch = source.read(np.arange(args.images))
            pixels = batch.pixels if isinstance(batch, PaddedImages) else batch
            figures["bytes_per_image"][name] = count_bytes(source) / args.images
            figures["padded_bytes_per_image"][name] = pixels.nbytes / args.images
            for step, function in functions.items():
                steps[step][name] = function
        rounds = {step: time_interleaved(steps[step], rounds=args.rounds) for step in STEPS}
    square = next(iter(FORMS))
    figures["crops_enlarged"] = {name: count_enlarged(shape) for name, shape in SHAPES.items()}
    figures["images_per_second"] = {
        step: {name: args.images / statistics.median(seconds) for name, seconds in rounds[step].items()}
        for step in STEPS
    }
    figures["times_squares"] = {
        step: {name: median_ratio(seconds, rounds[step][square]) for name, seconds in rounds[step].items()}
        for step in STEPS
    }
    save_figures(figures | {"rounds": rounds}, __file__, args.out)
    print_table(
        [
            "stored",
            "KB an image",
            "enlarged",
            *(f"{step}, ms an image" for step in STEPS),
            *(f"{step} / squares" for step in STEPS),
        ],
        [
            [
                name,
                figures["bytes_per_image"][name] / 1000,
                figures["crops_enlarged"][name],
                *(1000 / figures["images_per_second"][step][name] for step in STEPS),
                *(figures["times_squares"][step][name] for step in STEPS),
            ]
            for name in FORMS
        ],
    )


if __name__ == "__main__":
    main()
