"""Where the time of a step goes on a device, kernel by kernel.

    python benchmarks/kernels.py [--method propos] [--batches 16] [OVERRIDES of deepclust train]

The method is trained by the bare loop of `step.py`, `--rounds` epochs of so many batches after a first one that is not
counted: images a second, and seconds of the E-step, of which those that the features took. Then a few steps under
torch's profiler: for how much of the time the device is busy, with how many kernels, and what they do. On a CPU the
operations of torch stand in for kernels.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from measure import options, save, table, wait
from step import Bare, Work, configuration
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from deepclust.engine.lightning import silence_lightning

PROFILED = 4  # steps
KINDS = {  # the first that is found in the name of a kernel
    "fused reductions": ("triton_red", "triton_per"),
    "fused elementwise": ("triton",),
    "convolution, weights' gradient": ("wgrad",),
    "convolution, images' gradient": ("dgrad",),
    "convolution, forward": ("fprop", "ImplicitGemm", "Kernel<cutlass_tensorop", "convolution"),
    "batch normalisation": ("batch_norm",),
    "products": ("gemm", "nvjet", "mm"),
}


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def measure(method: str, overrides: list[str], *, batches: int, rounds: int, folder: Path) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = configuration(method, overrides, batches, rounds + 1, folder)
    torch.backends.cudnn.benchmark = cfg.hardware.benchmark
    work = Work(cfg)
    batches = min(batches, work.datamodule.batches_per_epoch)
    one = Bare(work, device, batches)
    encode_all, features = one.method.encode_all, [0.0]

    def timed(*given: Any) -> torch.Tensor:
        wait(device)
        start = time.perf_counter()
        rows = encode_all(*given)
        wait(device)
        features[-1] += time.perf_counter() - start
        return rows

    one.method.encode_all = timed  # type: ignore[method-assign]
    seconds, e_steps = [], []
    for _ in range(rounds + 1):
        features.append(0.0)
        before = one.method.e_step_seconds
        seconds.append(one.epoch() / batches)
        e_steps.append(one.method.e_step_seconds - before)
    indices = one.datamodule.epoch_indices(0, one.method.sampling_weights())
    raws = [one.datamodule.read_batch(indices[n % len(indices)], 0, n) for n in range(PROFILED)]
    wait(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, acc_events=True) as profiler:
        for raw in raws:
            one.step(raw)
        wait(device)
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    events = [e for e in profiler.events() if e.device_type == wanted]
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    kinds: dict[str, float] = defaultdict(float)
    for event in events:
        taken = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[event.name][0] += taken / 1e6 / PROFILED
        spent[event.name][1] += 1 / PROFILED
        kinds[kind_of(event.name)] += taken / 1e6 / PROFILED
    first, last = min(e.time_range.start for e in events), max(e.time_range.end for e in events)
    median = statistics.median(seconds[1:])
    return {
        "method": method,
        "batch_size": cfg.batch_size,
        "images_per_second": cfg.batch_size / median,
        "seconds_per_step": median,
        "e_step_seconds": statistics.median(e_steps[1:]),
        "features_seconds": statistics.median(features[2:]),
        "profiled": {
            "seconds_per_step": (last - first) / 1e6 / PROFILED,
            "busy": sum(kinds.values()),
            "kernels": len(events) / PROFILED,
            "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
            "longest": [[name, *spent[name]] for name in sorted(spent, key=lambda name: -spent[name][0])[:40]],
        },
    }


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--method", default="propos")
    parser.add_argument("--batches", type=int, default=16, help="of an epoch")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    silence_lightning()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(
            given.method, given.overrides, batches=given.batches, rounds=given.rounds, folder=Path(folder)
        )
    save(figures, __file__, given.out)
    profiled = figures["profiled"]
    print(
        f"{figures['images_per_second']:.0f} images/s, {1e3 * figures['seconds_per_step']:.1f} ms a step; E-step "
        f"{figures['e_step_seconds']:.2f} s, {figures['features_seconds']:.2f} s of it features; profiled, the device "
        f"is busy for {1e3 * profiled['busy']:.1f} of {1e3 * profiled['seconds_per_step']:.1f} ms"
    )
    table(["what", "ms a step"], [[kind, 1e3 * taken] for kind, taken in profiled["kinds"].items()])


if __name__ == "__main__":
    main()
