"""Where the time of a training step goes on a device, kernel by kernel.

    python benchmarks/kernels.py [--method propos] [--batches 16] [OVERRIDES of deepclust train]

The method is trained by `BareLoop` (training_loops.py), one epoch without a clock and then `--rounds` timed epochs of
`--batches` batches each. This gives images a second, the seconds of the E-step, and how many of those seconds the
features take. A few steps under torch's profiler follow. They tell for how much of the time the device is busy, with
how many kernels, and what the kernels do. On a CPU, torch's operations are counted instead of kernels.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from measure import make_argument_parser, print_table, save_figures, synchronize
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training_loops import BareLoop, TrainingSetup, compose_short_run

from deepclust.engine.lightning_settings import silence_lightning

NUM_PROFILED_STEPS = 4
KERNEL_KINDS = {  # the first kind of which a part is found in the name of a kernel
    "fused reductions": ("triton_red", "triton_per"),
    "fused elementwise": ("triton",),
    "convolution, weights' gradient": ("wgrad",),
    "convolution, images' gradient": ("dgrad",),
    "convolution, forward": ("fprop", "ImplicitGemm", "Kernel<cutlass_tensorop", "convolution"),
    "batch normalisation": ("batch_norm",),
    "products": ("gemm", "nvjet", "mm"),
}


def classify_kernel(name: str) -> str:
    return next((kind for kind, parts in KERNEL_KINDS.items() if any(part in name for part in parts)), "other")


def measure_method(method: str, overrides: list[str], *, batches: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Return the figures of one method."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = compose_short_run(method, overrides, batches=batches, epochs=rounds + 1, folder=folder)
    torch.backends.cudnn.benchmark = cfg.hardware.benchmark
    setup = TrainingSetup(cfg)
    batches = min(batches, setup.datamodule.batches_per_epoch)
    loop = BareLoop(setup, device, batches)
    encode_all, feature_seconds = loop.method.encode_all, [0.0]

    def timed_encode_all(*args: Any) -> torch.Tensor:
        synchronize(device)
        start = time.perf_counter()
        features = encode_all(*args)
        synchronize(device)
        feature_seconds[-1] += time.perf_counter() - start
        return features

    loop.method.encode_all = timed_encode_all  # type: ignore[method-assign]
    step_seconds, e_step_seconds = [], []
    for _ in range(rounds + 1):
        feature_seconds.append(0.0)
        e_step_seconds_before = loop.method.e_step_seconds
        step_seconds.append(loop.run_epoch() / batches)
        e_step_seconds.append(loop.method.e_step_seconds - e_step_seconds_before)
    indices = loop.datamodule.draw_epoch_batches(0, loop.method.sampling_weights())
    raw_batches = [loop.datamodule.read_batch(indices[n % len(indices)], 0, n) for n in range(NUM_PROFILED_STEPS)]
    synchronize(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, acc_events=True) as profiler:
        for raw_batch in raw_batches:
            loop.run_step(raw_batch)
        synchronize(device)
    device_type = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    events = [e for e in profiler.events() if e.device_type == device_type]
    seconds_and_calls: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # in one step, by kernel
    seconds_by_kind: dict[str, float] = defaultdict(float)  # in one step
    for event in events:
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        seconds = microseconds / 1e6 / NUM_PROFILED_STEPS
        seconds_and_calls[event.name][0] += seconds
        seconds_and_calls[event.name][1] += 1 / NUM_PROFILED_STEPS
        seconds_by_kind[classify_kernel(event.name)] += seconds
    first_start, last_end = min(e.time_range.start for e in events), max(e.time_range.end for e in events)
    longest = sorted(seconds_and_calls, key=lambda name: -seconds_and_calls[name][0])[:40]
    seconds_per_step = statistics.median(step_seconds[1:])
    return {
        "method": method,
        "batch_size": cfg.batch_size,
        "images_per_second": cfg.batch_size / seconds_per_step,
        "seconds_per_step": seconds_per_step,
        "e_step_seconds": statistics.median(e_step_seconds[1:]),
        "features_seconds": statistics.median(feature_seconds[2:]),
        "profiled": {
            "seconds_per_step": (last_end - first_start) / 1e6 / NUM_PROFILED_STEPS,
            "busy": sum(seconds_by_kind.values()),
            "kernels": len(events) / NUM_PROFILED_STEPS,
            "kinds": dict(sorted(seconds_by_kind.items(), key=lambda item: -item[1])),
            "longest": [[name, *seconds_and_calls[name]] for name in longest],
        },
    }


def main() -> None:
    parser = make_argument_parser(__doc__, rounds=3)
    parser.add_argument("--method", default="propos")
    parser.add_argument("--batches", type=int, default=16, help="number of batches in an epoch")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    silence_lightning()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_method(
            args.method, args.overrides, batches=args.batches, rounds=args.rounds, folder=Path(folder)
        )
    save_figures(figures, __file__, args.out)
    profiled = figures["profiled"]
    print(
        f"{figures['images_per_second']:.0f} images/s, {1e3 * figures['seconds_per_step']:.1f} ms a step; E-step "
        f"{figures['e_step_seconds']:.2f} s, {figures['features_seconds']:.2f} s of it features; profiled, the device "
        f"is busy for {1e3 * profiled['busy']:.1f} of {1e3 * profiled['seconds_per_step']:.1f} ms"
    )
    print_table(["what", "ms a step"], [[kind, 1e3 * seconds] for kind, seconds in profiled["kinds"].items()])


if __name__ == "__main__":
    main()
