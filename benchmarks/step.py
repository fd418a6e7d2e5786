"""What a training step costs for each method, where its time goes, and what the framework adds.

    python benchmarks/step.py [--methods propos,cc] [--batches 12] [--rounds 5] [OVERRIDES of deepclust train]

Each method is trained in two ways, which take turns epoch by epoch, with `--batches` batches in an epoch: by
`deepclust train` as it is, with Lightning, callbacks and logger ("framework"), and by a bare loop over the same batches
that calls nothing but the method's losses ("bare"). ProPos is trained in a third way, by plain PyTorch code in
propos_by_hand.py, and must come to the same weights ("by hand").

- Seconds a step leave out the E-step. Times, and ratios of times of the same round, are medians over the rounds.
- The parts of a step come from one more run, which waits for the device after every part.
- Floating-point operations are those of convolutions and matrix products, as torch counts them. The utilisation is the
  rate at which a step does them, relative to the rate of one large matrix product, which is measured here.
- "arithmetic" is the time that a step would take if it only did these operations, at the rate of that product. "memory"
  is the time that it would take if it only read and wrote what its operations read and write when none are fused, at
  the rate of a large copy. The larger of the two is the limit.
- "waits" are the lines of code at which a step makes the host wait for a GPU. There should be none.

The figures are saved after every method. A method that fails does not stop the others.
"""

import gc
import statistics
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from measure import (
    compose_train,
    default_overrides,
    make_argument_parser,
    median_ratio,
    print_table,
    save_figures,
)
from step_analysis import (
    PARTS,
    MemoryTrafficMode,
    StepPartsProfiler,
    find_device_waits,
    measure_device_limits,
)
from torch.utils.flop_counter import FlopCounterMode
from training_loops import UNTIMED_EPOCHS, BareLoop, ByHandLoop, InterleavedEpochs, TrainingSetup, compose_short_run

from deepclust.engine.cuda_graphs import disable_replay, release_recordings
from deepclust.engine.lightning_settings import silence_lightning
from deepclust.runs.results import measure_peak_memory

METHODS = "propos,byol,cc,drc,digpro,secu,coke,gcc,lnscc,scan_pretext,scan"


def measure_method(name: str, overrides: list[str], *, batches: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Return the figures of one method."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    release_recordings()  # the memory of the previous method's graphs
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    cfg = compose_short_run(name, overrides, batches=batches, epochs=rounds + UNTIMED_EPOCHS, folder=folder)
    setup = TrainingSetup(cfg)
    batches = min(batches, setup.datamodule.batches_per_epoch)
    other_loops = {"bare": BareLoop(TrainingSetup(cfg), device, batches)}
    if name == "propos":
        other_loops["by hand"] = ByHandLoop(TrainingSetup(cfg), device, batches)
    timer = InterleavedEpochs(other_loops, batches)
    setup.make_trainer(folder, timer).fit(setup.method, setup.datamodule)
    rounds_of = timer.seconds_per_step
    seconds_per_step = timer.median_seconds_per_step()
    e_step_seconds = statistics.median(timer.e_step_seconds)
    steps_per_epoch = setup.cfg.dataset.num_images / cfg.batch_size  # of an epoch with all batches
    figures: dict[str, Any] = {
        "batch_size": cfg.batch_size,
        "weights": sum(p.numel() for p in setup.method.backbone.parameters()),
        "seconds_per_step": seconds_per_step,
        "framework_over": {loop: median_ratio(rounds_of["framework"], rounds_of[loop]) for loop in other_loops},
        "rounds": dict(rounds_of),
        "e_step_seconds": e_step_seconds,
        "images_per_second": cfg.batch_size / seconds_per_step["framework"],
        "e_step_of_epoch": e_step_seconds / (steps_per_epoch * seconds_per_step["framework"]),
        "peak_memory_bytes": measure_peak_memory(),
    }
    if name == "propos":
        difference = other_loops["by hand"].max_weight_difference(setup.method)  # type: ignore[attr-defined]
        figures["by_hand_weights_differ_by"] = difference

    profiled = TrainingSetup(cfg)
    profiler = StepPartsProfiler(profiled.method)
    timer = InterleavedEpochs({}, batches)
    trainer = profiled.make_trainer(folder, timer, profiler=profiler, max_epochs=UNTIMED_EPOCHS + 1)
    trainer.fit(profiled.method, profiled.datamodule)
    figures["parts"] = profiler.seconds_of_parts(batches)
    figures["seconds_per_step_of_parts"] = timer.median_seconds_per_step()["framework"]

    bare = other_loops["bare"]
    indices = bare.datamodule.draw_epoch_batches(0, bare.method.sampling_weights())[0]
    raw_batch = bare.datamodule.read_batch(indices, 0, 0)
    figures["waits"] = find_device_waits(lambda: bare.run_step(raw_batch), device)
    # Operations can be counted only where they are neither compiled nor replayed.
    with torch.compiler.set_stance("force_eager"), disable_replay():
        with FlopCounterMode(display=False) as flop_counter:
            bare.run_step(raw_batch)
        with MemoryTrafficMode() as traffic:
            bare.run_step(raw_batch)
    figures["flops_per_step"] = flop_counter.get_total_flops()
    figures["unfused_bytes_per_step"] = traffic.bytes
    return figures


def main() -> None:
    parser = make_argument_parser(__doc__, rounds=5)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--batches", type=int, default=12, help="number of batches in an epoch")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    silence_lightning()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    use_bfloat16 = "bf16" in str(compose_train(*default_overrides(), *args.overrides).hardware.precision)
    limits = measure_device_limits(device, use_bfloat16=use_bfloat16)
    methods: dict[str, Any] = {}
    failed = []
    for name in args.methods.split(","):
        try:
            with tempfile.TemporaryDirectory() as folder:
                f = measure_method(name, args.overrides, batches=args.batches, rounds=args.rounds, folder=Path(folder))
        except Exception:  # the other methods are still measured
            traceback.print_exc()
            failed.append(name)
            continue
        f["utilisation"] = f["flops_per_step"] / f["seconds_per_step"]["framework"] / limits["flops_per_second"]
        f["roof_seconds"] = {
            "arithmetic": f["flops_per_step"] / limits["flops_per_second"],
            "memory": f["unfused_bytes_per_step"] / limits["bytes_per_second"],
        }
        methods[name] = f
        print(
            f"{name}: {f['images_per_second']:.0f} images/s", *(f"waits in {line}" for line in f["waits"]), flush=True
        )
        save_figures({"roof": limits, "batches": args.batches, "methods": methods}, __file__, args.out)
    print_table(
        ["method", "batch", "images/s", "ms/step", "/ bare", "/ by hand", *(f"{p}, ms" for p in PARTS), "E-step, s",
         "/ epoch", "MB", "arithmetic, ms", "memory, ms", "util."],
        [
            [
                name, f["batch_size"], f["images_per_second"], 1e3 * f["seconds_per_step"]["framework"],
                f["framework_over"]["bare"], f["framework_over"].get("by hand", ""),
                *(1e3 * f["parts"][part] for part in PARTS), f["e_step_seconds"], f["e_step_of_epoch"],
                f["peak_memory_bytes"] / 1e6, *(1e3 * seconds for seconds in f["roof_seconds"].values()),
                f["utilisation"],
            ]
            for name, f in methods.items()
        ],
    )  # fmt: skip
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
