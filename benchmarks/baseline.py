"""ProPos as the published codes train it, beside ours: the same batch, network, device and mathematics.

    python benchmarks/baseline.py [--batches 8] [--rounds 5] [--workers N] [--code DIR] [OVERRIDES of deepclust train]

The published way: each image becomes a PIL image in a worker of a loader, which augments it twice, image after image;
32-bit floats, planar memory, one pass through the networks for each view (where the recipe takes one pass for both, it
does too). Ours: `deepclust train` as it is. Both in turns, an epoch of `--batches` batches each, without the E-step;
images a second are medians over the rounds, and so is their ratio. The loader is timed at work, not as it starts: a
batch of each worker comes before the clock, then whole rounds of them, `--batches` at least.
"""

import os
import statistics
import tempfile
from pathlib import Path

import torch
from authors import Authors
from measure import options, ratio, save, table
from published import Published
from step import WARM_EPOCHS, Bare, Turns, Work, configuration

from deepclust.engine.lightning import silence_lightning


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--batches", type=int, default=8, help="of an epoch")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the published way's loader")
    parser.add_argument("--code", type=Path, help="a copy of the authors' code, timed as well (authors.py)")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    silence_lightning()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cfg = configuration("propos", given.overrides, given.batches, given.rounds + WARM_EPOCHS, folder)
        plain = configuration(
            "propos",
            [
                *(*given.overrides, "hardware.precision=32-true", "hardware.channels_last=false"),
                *("hardware.compile=null", "hardware.graphs=false", "hardware.fused_optimizer=false"),
            ],
            *(given.batches, given.rounds + WARM_EPOCHS, folder / "published"),
        )
        work = Work(cfg)
        others: dict[str, Bare] = {"published way": Published(Work(plain), device, given.batches, given.workers)}
        if given.code is not None:
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
