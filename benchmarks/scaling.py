"""How time and memory grow with images, clusters, features, image size and processes, and what 8 and 64 GPUs would do.

    python benchmarks/scaling.py [--only step gather ...] [--quick] [--rounds 3] [--out FILE.json] [--figure FILE.png]
    python benchmarks/scaling.py --read FILE.json ... [--figure FILE.png]  # measures nothing; tables and figure

Everything is measured with ProPos. The parts, which `--only` names, are:

- step: a training step, with its memory, against image size, batch size, clusters, features and network.
- processes: the same on 1, 2 and 4 processes of this machine, connected by gloo, with and without synchronised batch
  normalisation. The batch of a process stays the same.
- gather: the features of all images, gathered over 2 and 4 processes, with the memory that this takes.
- estep: k-means with a bounded number of iterations, alone, and its restarts shared out over processes; its memory.
- checkpoint: the size of a checkpoint and the time to write it (into the page cache), against weights and images.
- imagenet: operations, bytes and collectives of a batch of ResNet-50 at 224 pixels, counted in small batches,
  and the time in which a core decodes an image of its size.

Work of one process is timed in CPU seconds on a CPU. Several processes are timed on the clock, until the slowest is
done, and always compute on the CPU. Each process has `--threads` threads. `step`, `estep` and `checkpoint` take a GPU
where there is one, and then have ResNet-50 at 224 pixels and k-means of ImageNet's size, too. Memory is how much more a
process has held than at the start of the work (on a CPU this needs Linux).

A model is fitted to each quantity (scaling_model.py). With the counts of `imagenet` and with assumptions, which are
printed, it says what a run on ImageNet-1k would take. `--quick` takes a few small cases, to try the script out.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS_FOLDER, make_argument_parser, print_table, save_figures
from scaling_figure import draw_figure
from scaling_measurements import (
    Case,
    count_batch,
    measure_checkpoint,
    measure_decoding,
    measure_gather,
    measure_gather_memory,
    measure_kmeans,
    measure_kmeans_memory,
    measure_step,
    run_on_processes,
)
from scaling_model import MODELS, PLANS, extrapolate, read_assumptions
from torch.multiprocessing import set_forkserver_preload

PROCESSES = (1, 2, 4)
STEP = {"network": "conv_small", "pixels": 32, "batch": 32, "clusters": 10, "features": 256, "hidden": 4096}
STEP_CHANGES: list[Case] = [
    *({}, {"pixels": 16}, {"pixels": 48}, {"batch": 8}, {"batch": 64}, {"clusters": 1000}),
    *({"features": 64}, {"features": 1024}, {"hidden": 512}, {"network": "resnet18", "batch": 4}),
    {"network": "resnet18", "batch": 8},
]
GPU_STEP_CHANGES: list[Case] = [{"network": "resnet50", "pixels": 224, "batch": batch} for batch in (32, 64, 128)]
PROCESSES_CHANGES: list[Case] = [{}, {"synchronised": True}, {"hidden": 512}, {"pixels": 16}]
GATHER_CHANGES = [{"rows": rows, "features": features} for features in (64, 256) for rows in (2000, 16_000, 128_000)]
GATHER_MEMORY_CHANGES = [{"rows": rows, "features": features} for rows, features in [(40_000, 128), (80_000, 256)]]
KMEANS = {"rows": 20_000, "features": 128, "clusters": 100, "restarts": 1, "iterations": 5}
KMEANS_CHANGES: list[Case] = [
    *({}, {"rows": 5000}, {"rows": 80_000}, {"clusters": 10}, {"clusters": 400}, {"features": 32}, {"features": 512}),
    *({"restarts": 4}, {"iterations": 1}, {"iterations": 15}, {"rows": 80_000, "clusters": 10}),
    *({"rows": 5000, "clusters": 400}, {"features": 512, "clusters": 10}, {"clusters": 1000}),
]
GPU_KMEANS_CHANGES: list[Case] = [
    {"rows": 1_281_167, "features": 256, "clusters": 1000, "iterations": iterations} for iterations in (5, 15)
]
PROCESSES_KMEANS_CHANGES: list[Case] = [
    {"restarts": 4},
    {"restarts": 1},
    {"restarts": 4, "clusters": 20, "features": 256},
]
KMEANS_MEMORY_CHANGES: list[Case] = [
    *({}, {"rows": 80_000}, {"rows": 160_000}, {"rows": 80_000, "features": 256}, {"rows": 80_000, "restarts": 4}),
    {"rows": 80_000, "restarts": 8, "clusters": 20},
]
CHECKPOINT = STEP | {"batch": 8, "rows": 2000}
CHECKPOINT_CHANGES: list[Case] = [
    *({}, {"rows": 1_000_000}, {"network": "resnet18"}, {"network": "resnet50"}),
    {"network": "resnet50", "rows": 500_000},
]
PARTS = ("step", "processes", "gather", "estep", "checkpoint", "imagenet")
SIZES_OF_STEPS = ("processes", "network", "pixels", "batch", "synchronised", "hidden", "clusters", "features")
SIZES = (*SIZES_OF_STEPS, "rows", "restarts", "iterations")
SYNCHRONISED_COUNTS = ("operations", "collectives")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Which models of scaling_model.py are fitted to the cases of which measurement.
FITTED_TO = {
    "step": "step",
    "memory of a step": "step",
    "step on several processes": "processes",
    "gather": "gather",
    "memory of the gather": "gather_memory",
    "E-step": "estep",
    "memory of the E-step": "estep_memory",
    "size of a checkpoint": "checkpoint",
    "time of a checkpoint": "checkpoint",
}


def count_imagenet(threads: int, rounds: int, quick: bool) -> dict[str, float]:
    """Return the counts of a batch of ProPos with ResNet-50 at 224 pixels, and of one with ResNet-18 at 32.

    What grows with the batch is given by image. Operations and collectives are those of a batch, whatever its size.
    """
    pixels = 64 if quick else 224
    large = STEP | {"device": "cpu", "network": "resnet50", "pixels": pixels, "clusters": 1000, "stem": "imagenet"}
    small = STEP | {"device": "cpu", "network": "resnet18"}
    synchronised = large | {"pixels": 64, "batch": 4, "synchronised": True}

    def count(case: Case, processes: int = 1) -> dict[str, int]:
        return run_on_processes(count_batch, processes, case, threads=threads)[0]

    counts: dict[str, float] = {}
    for prefix, case in (("", large), ("resnet18_", small)):
        two, four = count(case | {"batch": 2}), count(case | {"batch": 4})
        for name in ("flops", "unfused_bytes", "kept_bytes", "clean_flops", "clean_unfused_bytes"):
            counts[f"{prefix}{name}_per_image"] = (four[name] - two[name]) / 2
        counts |= {f"{prefix}{name}": four[name] for name in ("operations", "parameters")}
    counts |= {f"synchronised_{name}": n for name, n in count(synchronised, 2).items() if name in SYNCHRONISED_COUNTS}
    num_images = 4 if quick else 32
    return counts | run_on_processes(measure_decoding, 1, num_images, rounds, threads=threads)[0]


class Measurements:
    """The measurements by name: each returns its cases with what was found, in lists by kind.

    Args:
        rounds: how often each case is timed; medians over them are given.
        threads: of each process.
        quick: whether to take the first cases only, in small sizes, and two processes at most.
    """

    def __init__(self, *, rounds: int, threads: int, quick: bool) -> None:
        self.rounds, self.threads, self.quick = rounds, threads, quick
        self.processes_to_try = PROCESSES[:2] if quick else PROCESSES

    def list_cases(self, base: Case, changes: Sequence[Case], processes: int = 1, device: str = DEVICE) -> list[Case]:
        """Return the cases that differ from `base` by the given changes."""
        place = {"processes": processes, "cores": len(os.sched_getaffinity(0)), "device": device}
        cases = [place | base | change for change in changes[: 3 if self.quick else None]]
        limits = {"batch": 8, "hidden": 64, "rows": 2000} if self.quick else {}
        return [case | {key: min(case[key], limit) for key, limit in limits.items() if key in case} for case in cases]

    def run(self, function: Callable[..., Any], processes: int, *arguments: Any) -> Any:
        """Return what a function of scaling_measurements.py finds, on the process that took the most."""
        found = run_on_processes(function, processes, *arguments, threads=self.threads)
        if isinstance(found[0], dict):
            return max(found, key=lambda case: case["seconds"] if "seconds" in case else case["peak_bytes"])
        return [max(cases, key=lambda case: case["seconds"]) for cases in zip(*found, strict=True)]

    def step(self) -> dict[str, list[Case]]:
        changes = [*STEP_CHANGES, *(GPU_STEP_CHANGES if DEVICE == "cuda" else [])]
        return {"step": [self.run(measure_step, 1, case, self.rounds) for case in self.list_cases(STEP, changes)]}

    def processes(self) -> dict[str, list[Case]]:
        by_number = [
            [
                self.run(measure_step, number, case, self.rounds)
                for case in self.list_cases(STEP, PROCESSES_CHANGES, number, "cpu")
            ]
            for number in self.processes_to_try
        ]
        return {
            "processes": [
                case | {"alone_seconds": alone["seconds"]}
                for cases in by_number
                for case, alone in zip(cases, by_number[0], strict=True)
            ]
        }

    def gather(self) -> dict[str, list[Case]]:
        found: dict[str, list[Case]] = {"gather": [], "gather_memory": []}
        for number in self.processes_to_try[1:]:
            cases = self.list_cases({}, GATHER_CHANGES, number, "cpu")
            found["gather"] += self.run(measure_gather, number, cases, 5 * self.rounds)
            cases = self.list_cases({}, GATHER_MEMORY_CHANGES, number, "cpu")
            found["gather_memory"] += [self.run(measure_gather_memory, number, case) for case in cases]
        return found

    def estep(self) -> dict[str, list[Case]]:
        changes = [*KMEANS_CHANGES, *(GPU_KMEANS_CHANGES if DEVICE == "cuda" else [])]
        times = self.run(measure_kmeans, 1, self.list_cases(KMEANS, changes), self.rounds)
        for number in self.processes_to_try[1:]:
            cases = self.list_cases(KMEANS, PROCESSES_KMEANS_CHANGES, number, "cpu")
            times += self.run(measure_kmeans, number, cases, self.rounds)
        memory = [self.run(measure_kmeans_memory, 1, case) for case in self.list_cases(KMEANS, KMEANS_MEMORY_CHANGES)]
        return {"estep": times, "estep_memory": memory}

    def checkpoint(self) -> dict[str, list[Case]]:
        cases = self.list_cases(CHECKPOINT, CHECKPOINT_CHANGES)
        return {"checkpoint": [self.run(measure_checkpoint, 1, case, self.rounds) for case in cases]}

    def imagenet(self) -> dict[str, Any]:
        return {"imagenet": count_imagenet(self.threads, self.rounds, self.quick)}


def fitted_cases(model: str, figures: dict[str, Any]) -> list[Case]:
    """Return the cases that a model is fitted to: on a GPU, those of the GPU; none if they were not measured."""
    cases = figures.get(FITTED_TO[model], [])
    if model == "step on several processes":
        cases = [case for case in cases if case["processes"] > 1]
    return [case for case in cases if case["device"] == cases[0]["device"]]


def explain(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the fits of all models whose cases were measured and, with the counts of `imagenet`, the extrapolation."""
    fits = {name: MODELS[name].fit(cases) for name in FITTED_TO if (cases := fitted_cases(name, figures))}
    if "imagenet" not in figures:
        return {"fits": fits}
    counts = figures["imagenet"]
    assumptions = read_assumptions(RESULTS_FOLDER, counts)
    numbers = {name: assumed.value for name, assumed in assumptions.items()}
    return {
        "fits": fits,
        "assumptions": {name: asdict(assumed) for name, assumed in assumptions.items()},
        "plans": {name: asdict(plan) | extrapolate(plan, numbers, counts) for name, plan in PLANS.items()},
    }


def print_tables(figures: dict[str, Any]) -> None:
    """Print each case beside its model, the constants of the models, the assumptions and the extrapolation."""
    for name, fit in figures["fits"].items():
        cases = fitted_cases(name, figures)
        sizes = [key for key in SIZES if len({str(case.get(key)) for case in cases}) > 1]
        print(f"\n{name}")
        print_table(
            [*sizes, fit["quantity"], "model / measured"],
            [
                [*(case.get(size, "") for size in sizes), float(case[fit["quantity"]]), f"{residual:+.1%}"]
                for case, residual in zip(cases, fit["residuals"], strict=True)
            ],
        )
        print(f"residuals: {fit['median_residual']:.1%} (median), {fit['largest_residual']:.1%} (largest)")
        print_table(["constant", "value"], list(fit["constants"].items()))
    if "plans" in figures:
        print()
        counted = [[name, float(count)] for name, count in figures["imagenet"].items()]
        print_table(["counted", "value"], counted)
        print()
        assumed = [[name, a["value"], a["unit"], a["source"]] for name, a in figures["assumptions"].items()]
        print_table(["assumption", "value", "unit", "source"], assumed)
        print()
        plans = figures["plans"]
        rows = [[key, *(plan[key] for plan in plans.values())] for key in next(iter(plans.values()))]
        print_table(["", *plans], rows)


def main() -> None:
    parser = make_argument_parser(__doc__, rounds=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="a few small cases, to try the script out")
    parser.add_argument("--read", type=Path, nargs="+", help="measure nothing, and take the figures of JSON files")
    parser.add_argument("--figure", type=Path, help="the PNG file to draw")
    args = parser.parse_args()
    if args.read:
        figures: dict[str, Any] = {}
        for file in args.read:
            figures |= json.loads(file.read_text())
    else:
        set_forkserver_preload(["scaling_measurements"])  # imported once, not by every process
        figures = {"quick": args.quick}
        measurements = Measurements(rounds=args.rounds, threads=args.threads, quick=args.quick)
        for part in args.only:
            started_at = time.monotonic()
            figures |= getattr(measurements, part)()
            print(f"{part}: {time.monotonic() - started_at:.0f} s", flush=True)
            save_figures(figures | explain(figures), __file__, args.out)
    figures |= explain(figures)
    print_tables(figures)
    if args.figure:
        draw_figure(figures, partial(fitted_cases, figures=figures), args.figure)


if __name__ == "__main__":
    main()
