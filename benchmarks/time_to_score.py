"""Wall time of training until an accuracy is reached, for one run or several seeds.

    python benchmarks/time_to_score.py --acc 0.9 [--seeds 0,1,2] [OVERRIDES of deepclust train]

After every epoch the run is judged as always, by the method's own rule, or by k-means on its features (`--rule
kmeans`); the clock stands still meanwhile. Training ends at the first epoch that reaches the accuracy, or at its end.
Labels decide when to stop here, so this measures speed; it picks no result.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from measure import composed, options, save, table, wait

from deepclust.callbacks.evaluation import Evaluator
from deepclust.commands.train import run


class Clock(Callback):
    """Stops the run at the accuracy, and keeps (seconds, epoch, accuracy) of every epoch."""

    curve: list[tuple[float, int, float]] = []  # noqa: RUF012  of the latest run in this process

    def __init__(self, *, evaluator: Evaluator, acc: float, rule: str) -> None:
        self.evaluator, self.acc, self.rule = evaluator, acc, rule
        self.seconds, self.e_step_before = 0.0, 0.0
        Clock.curve = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.resumed = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        wait(pl_module.device)
        self.seconds += time.perf_counter() - self.resumed
        stopped = time.perf_counter()
        scores = self.evaluator(pl_module, trainer.datamodule).scores[self.rule]
        assert scores is not None, f"the method has no rule {self.rule}"
        Clock.curve.append((self.seconds, trainer.current_epoch + 1, scores["acc"]))
        # A time limit of the trainer's may have stopped it as well.
        trainer.should_stop = trainer.should_stop or scores["acc"] >= self.acc
        self.resumed = time.perf_counter()
        e_step = pl_module.e_step_seconds - self.e_step_before
        self.e_step_before = pl_module.e_step_seconds
        print(
            f"epoch {trainer.current_epoch + 1}: ACC {scores['acc']:.4f} after {self.seconds:.1f} s; "
            f"E-step {e_step:.2f} s, judging {self.resumed - stopped:.2f} s",
            flush=True,
        )


def main() -> None:
    parser = options(__doc__, rounds=1)
    parser.add_argument("--acc", type=float, required=True, help="a fraction")
    parser.add_argument("--rule", choices=["method", "kmeans"], default="method")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    runs = {}
    for seed in map(int, given.seeds.split(",")):
        cfg = composed(
            *given.overrides,
            *(f"seed={seed}", "~callbacks.evaluation", "report.map_points=0", "pixel_baseline_max_values=0"),
            *("+callbacks.clock._target_=time_to_score.Clock", "+callbacks.clock.needs={evaluator: evaluator}"),
            *(f"+callbacks.clock.acc={given.acc}", f"+callbacks.clock.rule={given.rule}"),
        )
        with tempfile.TemporaryDirectory() as folder:
            run(cfg, Path(folder))
        from time_to_score import Clock as Used  # the class that Hydra made; this script is __main__

        seconds, epoch, acc = Used.curve[-1]
        runs[seed] = {"seconds": seconds, "epochs": epoch, "reached": acc >= given.acc, "acc": acc, "curve": Used.curve}
    reached = [r["seconds"] for r in runs.values() if r["reached"]]
    median = statistics.median(reached) if reached else None
    save({"acc": given.acc, "rule": given.rule, "overrides": given.overrides, "runs": runs, "seconds": median},
         __file__, given.out)  # fmt: skip
    table(
        ["seed", "seconds", "epochs", "ACC", "reached"],
        [[seed, r["seconds"], r["epochs"], r["acc"], r["reached"]] for seed, r in runs.items()],
    )


if __name__ == "__main__":
    main()
