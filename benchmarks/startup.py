"""How long one waits before anything happens, by the wall clock, medians over the rounds.

    python benchmarks/startup.py [--rounds 5]

Python and torch alone stand beside, since most of it is theirs. `first step`: `deepclust train` on the digits until its
first optimiser step is done. Every start is a process of its own; files are in the system's cache, for each was started
once before.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning import Callback
from measure import in_turns, options, save, table

CLI = "import sys; from deepclust.cli.main import main; sys.argv[0] = 'deepclust'; sys.exit(main())"
STARTS = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import lightning": ["-c", "import lightning"],
    "deepclust --help": ["-c", CLI, "--help"],
    "deepclust train --help": ["-c", CLI, "train", "--help"],
    "deepclust train --cfg job": ["-c", CLI, "train", "--cfg", "job"],
    "deepclust train, first step": ["-c", CLI, "train", "+callbacks.first._target_=startup.Stop"],
}
UNUSED = ["wandb", "faiss", "timm", "matplotlib", "torchvision.datasets", "sklearn.manifold", "tensorboard", "onnx"]


class Stop(Callback):
    """Ends the process after the first step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        print("imported:", *(name for name in UNUSED if name in sys.modules))
        sys.stdout.flush()
        os._exit(0)


def main() -> None:
    given = options(__doc__, rounds=5).parse_args()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(given.threads),
    }
    with tempfile.TemporaryDirectory() as folder:

        def start(arguments: list[str]) -> str:
            command = [sys.executable, *arguments]
            return subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, check=True
            ).stdout

        seconds = in_turns({name: lambda a=a: start(a) for name, a in STARTS.items()}, rounds=given.rounds)
        said = start(STARTS["deepclust train, first step"]).splitlines()
    imported = next(line for line in said if line.startswith("imported:")).split()[1:]
    medians = {name: sorted(taken)[len(taken) // 2] for name, taken in seconds.items()}
    save({"seconds": medians, "rounds": seconds, "unused_but_imported_by_train": imported}, __file__, given.out)
    table(["", "s"], list(medians.items()))
    print("imported by train and not used:", ", ".join(imported) or "nothing")


if __name__ == "__main__":
    main()
