"""What the benchmarks share: configurations, timing in turns, what they ran on, and where the figures go."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from deepclust.engine.launch import keep_freed_memory
from deepclust.runs.provenance import read_commit, read_versions

RESULTS = Path(__file__).parent / "results"


def options(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has; its docstring is the description. The process is set up as commands are."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="in turns, of which medians are taken")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--out", type=Path, help="the JSON file; otherwise one in benchmarks/results")
    return parser


def composed(*overrides: str) -> DictConfig:
    """The configuration of `deepclust train OVERRIDES`."""
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        choices = compose("train", overrides=list(overrides), return_hydra_config=True).hydra.runtime.choices
        cfg = compose("train", overrides=list(overrides))
    for group in cfg.names:
        cfg.names[group] = cfg.names[group] or choices[group]
    return cfg


def here() -> list[str]:
    """Overrides for this machine: CIFAR-10 and the fast way on a GPU, small images and one process elsewhere."""
    return ["dataset=cifar10", "hardware=gpu"] if torch.cuda.is_available() else ["dataset=usps", "hardware=cpu"]


def wait(device: torch.device | str) -> None:
    """Until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def in_turns(
    works: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each work in each round, one after the other in every round; each is done once before, unmeasured."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            wait(device)
            start = time.perf_counter()
            work()
            wait(device)
            if turn:
                taken[name].append(time.perf_counter() - start)
    return taken


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median over the rounds of one time by another of the same round."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


@cache
def machine() -> dict[str, Any]:
    """What was run, on what; as it was when first asked, for results that are written change the tree."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "command": " ".join(["python", *(os.path.relpath(sys.argv[0]), *sys.argv[1:])]),
        "commit": read_commit(),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": read_versions(),
    }


def save(figures: dict[str, Any], script: str, out: Path | None) -> None:
    """Write the figures, and what they were taken on, as JSON."""
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    file = out or RESULTS / f"{Path(script).stem}_{kind}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")
    print(f"written: {os.path.relpath(file)}", flush=True)


def bare_packages(code: Path, *names: str) -> None:
    """Make packages in the folder `code` importable without what their __init__ files import."""
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(code / name)]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows of text and numbers in columns, numbers to three digits."""
    texts = [list(header), *([f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    for first, *others in texts:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))
