"""How long commands take to start: wall time from the start of a process, as medians over the rounds.

    python benchmarks/startup.py [--rounds 5]

The starts of Python and of imports alone are timed as well, because most of the time is theirs. "first step" is
`deepclust train` on the digits until its first optimizer step is done. Every start is a process of its own. Each one
runs once before the clock starts, so that its files are in the system's cache.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning import Callback
from measure import RUN_CLI, make_argument_parser, print_table, save_figures, time_interleaved

ARGUMENTS_OF_STARTS = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import lightning": ["-c", "import lightning"],
    "deepclust --help": ["-c", RUN_CLI, "--help"],
    "deepclust train --help": ["-c", RUN_CLI, "train", "--help"],
    "deepclust train --cfg job": ["-c", RUN_CLI, "train", "--cfg", "job"],
    "deepclust train, first step": ["-c", RUN_CLI, "train", "+callbacks.first._target_=startup.ExitAfterFirstStep"],
}
UNUSED_MODULES = [  # by a training on the digits
    *("wandb", "faiss", "timm", "matplotlib", "torchvision.datasets", "sklearn.manifold", "tensorboard", "onnx")
]


class ExitAfterFirstStep(Callback):
    """Prints which modules of UNUSED_MODULES are imported, and ends the process after the first step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        print("imported:", *(name for name in UNUSED_MODULES if name in sys.modules))
        sys.stdout.flush()
        os._exit(0)


def main() -> None:
    args = make_argument_parser(__doc__, rounds=5).parse_args()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(args.threads),
    }
    with tempfile.TemporaryDirectory() as folder:

        def start_python(arguments: list[str]) -> str:
            command = [sys.executable, *arguments]
            return subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, check=True
            ).stdout

        seconds = time_interleaved(
            {name: lambda a=a: start_python(a) for name, a in ARGUMENTS_OF_STARTS.items()}, rounds=args.rounds
        )
        output = start_python(ARGUMENTS_OF_STARTS["deepclust train, first step"]).splitlines()
    imported = next(line for line in output if line.startswith("imported:")).split()[1:]
    medians = {name: sorted(rounds)[len(rounds) // 2] for name, rounds in seconds.items()}
    save_figures({"seconds": medians, "rounds": seconds, "unused_but_imported_by_train": imported}, __file__, args.out)
    print_table(["", "s"], list(medians.items()))
    print("imported by train and not used:", ", ".join(imported) or "nothing")


if __name__ == "__main__":
    main()
