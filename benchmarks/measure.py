"""What all benchmarks share: options, configurations, timing, the description of the machine, and output."""

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
from typing import Any, Literal

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from deepclust.engine.launch import keep_freed_memory
from deepclust.runs.provenance import read_commit, read_versions

RESULTS_FOLDER = Path(__file__).parent / "results"
RUN_CLI = "import sys; from deepclust.cli.main import main; sys.argv[0] = 'deepclust'; sys.exit(main())"


def make_argument_parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark has; `description` is the docstring of the script.

    It also makes this process keep the memory that tensors free, as every `deepclust` command does.
    """
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="number of rounds; medians over them are reported")
    parser.add_argument("--threads", type=int, default=1, help="number of torch's threads on a CPU")
    parser.add_argument("--out", type=Path, help="the JSON file to write (default: one in benchmarks/results)")
    return parser


def compose_train(*overrides: str) -> DictConfig:
    """Return the configuration of `deepclust train OVERRIDES`."""
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        choices = compose("train", overrides=list(overrides), return_hydra_config=True).hydra.runtime.choices
        cfg = compose("train", overrides=list(overrides))
    for group in cfg.names:
        cfg.names[group] = cfg.names[group] or choices[group]
    return cfg


def default_overrides() -> list[str]:
    """Return overrides that suit this machine: CIFAR-10 and `hardware=gpu` on a GPU, small images on a CPU."""
    return ["dataset=cifar10", "hardware=gpu"] if torch.cuda.is_available() else ["dataset=usps", "hardware=cpu"]


def synchronize(device: torch.device | str) -> None:
    """Wait until a GPU has finished its work; return at once on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def time_interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Return the seconds that each function takes in each round.

    In every round the functions run one after the other. One round without a clock comes first, to warm up.
    `clock` is time.perf_counter, or time.process_time for CPU seconds, which other programs disturb less.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(0 if warm_up else 1, rounds + 1):
        for name, function in functions.items():
            synchronize(device)
            start = clock()
            function()
            synchronize(device)
            if round_number > 0:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio of two times of the same round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def read_memory(name: Literal["VmRSS", "VmHWM"]) -> int:
    """Return the bytes that this process holds (VmRSS), or the most that it held since `reset_peak_memory` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak_memory() -> None:
    """Let the peak of memory of this process begin anew, on Linux."""
    Path("/proc/self/clear_refs").write_text("5")


@cache
def describe_machine() -> dict[str, Any]:
    """Return the command, the commit, the machine and the versions.

    The first answer is kept: a results file that the benchmark writes would otherwise mark the commit as modified.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processors = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "command": " ".join(["python", *(os.path.relpath(sys.argv[0]), *sys.argv[1:])]),
        "commit": read_commit(),
        "processor": processors[0] if processors else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": read_versions(),
    }


def save_figures(figures: dict[str, Any], script: str, out: Path | None) -> None:
    """Write the figures and the description of the machine as JSON to `out`, or to a file named after the script."""
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    file = out or RESULTS_FOLDER / f"{Path(script).stem}_{kind}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": describe_machine(), **figures}, indent=2) + "\n")
    print(f"written: {os.path.relpath(file)}", flush=True)


def skip_package_init(code: Path, *packages: str) -> None:
    """Make modules of packages in the folder `code` importable without running the packages' `__init__.py`."""
    for package in packages:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(code / package)]


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows of text and numbers in aligned columns, with three significant digits for floats."""
    texts = [list(header), *([f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    for first, *others in texts:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))
