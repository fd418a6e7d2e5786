"""Wall time of training until an accuracy is reached, for one run or several seeds.

    python benchmarks/time_to_score.py --acc 0.9 [--seeds 0,1,2] [OVERRIDES of deepclust train]

After every epoch the model is evaluated in the usual way, and the accuracy is that of the method's own rule or that of
k-means on its features (`--rule kmeans`). The clock stops during the evaluation. Training ends after the first epoch
that reaches the accuracy, at the latest after its last epoch. Here labels decide when to stop, so this is a measure of
speed only; it must not be used to select a result.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from measure import compose_train, make_argument_parser, print_table, save_figures, synchronize

from deepclust.callbacks.evaluation import Evaluator
from deepclust.commands.train import run


class StopAtAccuracy(Callback):
    """Stops the training at the accuracy `acc`, and keeps (seconds, epoch, accuracy) of every epoch."""

    curve: list[tuple[float, int, float]] = []  # noqa: RUF012  that of the latest run in this process

    def __init__(self, *, evaluator: Evaluator, acc: float, rule: str) -> None:
        self.evaluator, self.acc, self.rule = evaluator, acc, rule
        self.seconds, self.previous_e_step_seconds = 0.0, 0.0
        StopAtAccuracy.curve = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.clock_start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        synchronize(pl_module.device)
        self.seconds += time.perf_counter() - self.clock_start
        evaluation_start = time.perf_counter()
        scores = self.evaluator(pl_module, trainer.datamodule).scores[self.rule]
        assert scores is not None, f"the method has no rule {self.rule}"
        StopAtAccuracy.curve.append((self.seconds, trainer.current_epoch + 1, scores["acc"]))
        # The trainer may have been stopped by its time limit already.
        trainer.should_stop = trainer.should_stop or scores["acc"] >= self.acc
        self.clock_start = time.perf_counter()
        e_step_seconds = pl_module.e_step_seconds - self.previous_e_step_seconds
        self.previous_e_step_seconds = pl_module.e_step_seconds
        print(
            f"epoch {trainer.current_epoch + 1}: ACC {scores['acc']:.4f} after {self.seconds:.1f} s; "
            f"E-step {e_step_seconds:.2f} s, evaluation {self.clock_start - evaluation_start:.2f} s",
            flush=True,
        )


def main() -> None:
    parser = make_argument_parser(__doc__, rounds=1)
    parser.add_argument("--acc", type=float, required=True, help="the accuracy to reach, between 0 and 1")
    parser.add_argument("--rule", choices=["method", "kmeans"], default="method")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = {}
    for seed in map(int, args.seeds.split(",")):
        cfg = compose_train(
            *args.overrides,
            *(f"seed={seed}", "~callbacks.evaluation", "report.map_points=0", "pixel_baseline_max_values=0"),
            "+callbacks.stop._target_=time_to_score.StopAtAccuracy",
            "+callbacks.stop.needs={evaluator: evaluator}",
            *(f"+callbacks.stop.acc={args.acc}", f"+callbacks.stop.rule={args.rule}"),
        )
        with tempfile.TemporaryDirectory() as folder:
            run(cfg, Path(folder))
        # The class of which Hydra made an object: StopAtAccuracy here is another one, as this script is __main__.
        from time_to_score import StopAtAccuracy as ImportedStopAtAccuracy

        curve = ImportedStopAtAccuracy.curve
        seconds, epoch, acc = curve[-1]
        runs[seed] = {"seconds": seconds, "epochs": epoch, "reached": acc >= args.acc, "acc": acc, "curve": curve}
    seconds_of_successes = [r["seconds"] for r in runs.values() if r["reached"]]
    median = statistics.median(seconds_of_successes) if seconds_of_successes else None
    figures = {"acc": args.acc, "rule": args.rule, "overrides": args.overrides, "runs": runs, "seconds": median}
    save_figures(figures, __file__, args.out)
    print_table(
        ["seed", "seconds", "epochs", "ACC", "reached"],
        [[seed, r["seconds"], r["epochs"], r["acc"], r["reached"]] for seed, r in runs.items()],
    )


if __name__ == "__main__":
    main()
