"""ProPos: `deepclust train` against the way of published code, and against the authors' own code.

    python benchmarks/baseline.py [--batches 8] [--rounds 5] [--workers N] [--code DIR] [OVERRIDES of deepclust train]

All sides have the same batch size, network, device and mathematics. They are:

- "framework": `deepclust train` as it is.
- "published way": each image becomes a PIL image and is augmented twice in a worker of a DataLoader, image after image.
  Training is in 32-bit floats with planar memory (no channels_last), with one pass through the networks for each view,
  or one for both where the recipe does that (published_way.py, propos_by_hand.py).
- "authors' code", with `--code DIR`: the training step of the authors on the same batches (authors_code.py).

They take turns, an epoch of `--batches` batches each, and the E-step is left out. Images a second, and ratios of times
of the same round, are medians over the rounds. The DataLoader is timed while it is in full swing: one batch of each
worker comes before the clock starts, then a multiple of the number of workers, at least `--batches`.
"""

import os
import tempfile
from pathlib import Path

import torch
from authors_code import AuthorsCodeLoop
from measure import make_argument_parser, median_ratio, print_table, save_figures
from published_way import PublishedWayLoop
from training_loops import UNTIMED_EPOCHS, BareLoop, InterleavedEpochs, TrainingSetup, compose_short_run

from deepclust.engine.lightning_settings import silence_lightning

PUBLISHED_WAY_OVERRIDES = [
    *("hardware.precision=32-true", "hardware.channels_last=false"),
    *("hardware.compile=null", "hardware.graphs=false", "hardware.fused_optimizer=false"),
]


def main() -> None:
    parser = make_argument_parser(__doc__, rounds=5)
    parser.add_argument("--batches", type=int, default=8, help="number of batches in an epoch")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="worker processes of the DataLoader")
    parser.add_argument("--code", type=Path, help="a copy of the authors' code, which is then timed as well")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    silence_lightning()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"batches": args.batches, "epochs": args.rounds + UNTIMED_EPOCHS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cfg = compose_short_run("propos", args.overrides, **sizes, folder=folder)
        published_way_cfg = compose_short_run(
            "propos", [*args.overrides, *PUBLISHED_WAY_OVERRIDES], **sizes, folder=folder / "published"
        )
        setup = TrainingSetup(cfg)
        other_loops: dict[str, BareLoop] = {
            "published way": PublishedWayLoop(TrainingSetup(published_way_cfg), device, args.batches, args.workers)
        }
        if args.code is not None:
            other_loops["authors' code"] = AuthorsCodeLoop(
                TrainingSetup(published_way_cfg), device, args.batches, args.workers, args.code
            )
        timer = InterleavedEpochs(other_loops, args.batches)
        setup.make_trainer(folder, timer).fit(setup.method, setup.datamodule)
    rounds = timer.seconds_per_step
    images_per_second = {loop: cfg.batch_size / seconds for loop, seconds in timer.median_seconds_per_step().items()}
    times = {loop: median_ratio(seconds, rounds["framework"]) for loop, seconds in rounds.items()}
    figures = {
        "dataset": cfg.dataset.name,
        "backbone": cfg.names.backbone,
        "weights": sum(p.numel() for p in setup.method.backbone.parameters()),
        "workers": args.workers,
        "batch_size": cfg.batch_size,
        "images_per_second": images_per_second,
        "times": times,  # how many times as fast the framework is
        "rounds": dict(rounds),
    }
    save_figures(figures, __file__, args.out)
    print_table(
        ["", "images/s", "deepclust is so many times as fast"],
        [[loop, images_per_second[loop], times[loop]] for loop in rounds],
    )


if __name__ == "__main__":
    main()
