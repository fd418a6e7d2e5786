"""What a training step costs, method by method, where the time goes, and what the framework adds.

    python benchmarks/step.py [--methods propos,cc] [--batches 12] [--rounds 5] [OVERRIDES of deepclust train]

Each method is trained twice in turns, an epoch of `--batches` batches each: by `deepclust train` as it is (Lightning,
callbacks, logger) and by a bare loop over the same batches that calls the method's losses and nothing else. ProPos is
also trained by `by_hand.py`, plain PyTorch, whose weights must come out the same. Seconds a step, E-step taken out;
medians over the rounds of times and of their ratios. One more run, which waits for the device after every part, tells
the parts. Floating-point operations are those of convolutions and products, as torch counts them; the utilisation is
their share of what the device does in one large product, measured here. "arithmetic" and "memory" are what a step would
take if it did nothing but these operations, or but read and write what its operations do when none are fused, at the
speed of that product and of a large copy: the larger one binds. "waits" are lines of a step that make the host wait for
a GPU; there should be none. Figures are saved method by method, and a method that
fails leaves the others be.
"""

import gc
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from by_hand import ProPosByHand
from lightning import Callback
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.profilers import Profiler
from measure import composed, here, in_turns, options, ratio, save, table, wait
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from deepclust.commands.train import find_earlier_run
from deepclust.config.build import build, build_each
from deepclust.datasets.datamodule import read_ahead
from deepclust.engine.cuda_graphs import as_written, release, replaying
from deepclust.engine.lightning import silence_lightning
from deepclust.methods.base import ClusteringMethod
from deepclust.runs.assemble import build_datamodule, build_evaluator, build_method, prepare_for_hardware
from deepclust.runs.checkpoint import load_checkpoint, load_method
from deepclust.runs.resolve import resolve_config
from deepclust.runs.results import measure_peak_memory

METHODS = "propos,byol,cc,drc,digpro,secu,coke,gcc,lnscc,scan_pretext,scan"
WARM_EPOCHS = 2  # not counted: the trainer's own start, and what is recorded or compiled in the first and second epoch
PARTS = ["reading", "views", "forward", "loss", "backward", "optimiser", "other"]


class Work:
    """A method and its data as a run has them before the first step."""

    def __init__(self, cfg: DictConfig) -> None:
        earlier = find_earlier_run(cfg, Path())  # `configuration` has run it
        self.images = build(cfg.dataset.source)
        self.cfg, _ = resolve_config(cfg, self.images, earlier)
        self.datamodule = build_datamodule(self.cfg, self.images)
        self.method: ClusteringMethod = build_method(self.cfg)
        if earlier is not None:
            self.method.start_from(load_method(load_checkpoint(Path(earlier["run"])))[1])
        prepare_for_hardware(self.cfg, self.method, self.datamodule)

    def trainer(self, folder: Path, *more: Callback, **arguments: Any) -> Any:
        """The trainer of `deepclust train` with its callbacks and logger, and more."""
        available = {"folder": folder, "evaluator": build_evaluator(self.cfg, self.images), "config": {}}
        callbacks = [*build_each(self.cfg.callbacks, available), *more]
        return build(self.cfg.trainer, callbacks=callbacks, logger=build_each(self.cfg.logger, available), **arguments)


class Bare:
    """Training without Lightning: read, views, losses, backward, optimiser."""

    def __init__(self, work: Work, device: torch.device, batches: int) -> None:
        self.method, self.datamodule, self.device = work.method.to(device), work.datamodule, device
        if "64" in str(work.cfg.hardware.precision):
            self.method.double()
        self.low = "bf16" in str(work.cfg.hardware.precision)
        self.trainer = SimpleNamespace(
            lightning_module=self.method,
            datamodule=self.datamodule,
            strategy=SimpleNamespace(root_device=device),
            precision_plugin=SimpleNamespace(forward_context=self.context),
            accumulate_grad_batches=1,
            num_training_batches=batches,
            current_epoch=0,
            global_step=0,
        )
        self.method._trainer = self.datamodule.trainer = self.trainer  # type: ignore[assignment]
        self.method.log = lambda *_, **__: None  # type: ignore[method-assign]
        self.datamodule.setup("fit")
        self.method.on_train_start()
        made = self.method.configure_optimizers()
        self.optimizer, self.schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        self.batches = batches
        self.method.train()

    def context(self) -> Any:
        if self.method.weight_dtype == torch.float64:
            return DoublePrecision().forward_context()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.low)

    def epoch(self) -> float:
        """Seconds of its steps."""
        epoch = self.trainer.current_epoch
        self.method.on_train_epoch_start()
        indices = self.datamodule.epoch_indices(epoch, self.method.sampling_weights())[: self.batches]
        wait(self.device)
        start = time.perf_counter()
        for raw in read_ahead(lambda i=i, n=n: self.datamodule.read_batch(i, epoch, n) for n, i in enumerate(indices)):
            self.step(raw)
        wait(self.device)
        self.trainer.current_epoch += 1
        return time.perf_counter() - start

    def step(self, raw: Any) -> None:
        for name, value in vars(raw).items():
            if isinstance(value, Tensor):
                setattr(raw, name, value.to(self.device, non_blocking=True))
        batch = self.datamodule.on_after_batch_transfer(raw, 0)
        batch.draws.seed_layers(self.device, 0)
        self.optimizer.zero_grad()
        with self.context():
            loss = torch.stack(list(self.method.losses(batch).values())).sum()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.trainer.global_step += 1


class ByHand(Bare):
    """The same by the plain rendering of ProPos."""

    def __init__(self, work: Work, device: torch.device, batches: int) -> None:
        super().__init__(work, device, batches)
        self.plain = ProPosByHand(self.method, steps_per_epoch=self.method.steps_per_epoch)  # type: ignore[arg-type]

    def epoch(self) -> float:
        epoch, method = self.trainer.current_epoch, self.method
        clean = list(self.datamodule.clean_batches(self.datamodule.fit, self.device))
        with self.context():
            features = self.plain.features([images.to(method.weight_dtype) for images in clean])
            features = features.float() if features.dtype == torch.bfloat16 else features
        method.e_step(features, (self.datamodule.seed, "e_step", epoch))
        labels, on = method.pseudo_labels.assignments, epoch >= method.warmup_epochs  # type: ignore[attr-defined, operator]
        indices = self.datamodule.epoch_indices(epoch, None)[: self.batches]
        wait(self.device)
        start = time.perf_counter()
        for raw in read_ahead(lambda i=i, n=n: self.datamodule.read_batch(i, epoch, n) for n, i in enumerate(indices)):
            draws, total = raw.draws, raw.draws.total
            rows = slice(0, len(raw.images))
            images = raw.images.to(self.device, non_blocking=True)
            views = self.datamodule.views(images, draws.generator("views"), rows=rows, total=total)
            a, b = (view.to(method.weight_dtype) for view in views)
            with self.context():
                noise = None
                if on and method.noise_std:  # type: ignore[attr-defined]
                    like = a.new_empty(len(a), method.pseudo_labels.centroids.shape[1])  # type: ignore[attr-defined]
                    noise = tuple(method.noise_std * draws.normal_like(like, f"noise of {v}") for v in "ab")  # type: ignore
                self.plain.step(a, b, labels[raw.indices.to(self.device, non_blocking=True)], noise, scatter=on)
        wait(self.device)
        self.trainer.current_epoch += 1
        return time.perf_counter() - start

    def difference(self, trained: ClusteringMethod) -> float:
        """The largest difference of a weight of the backbone, of the largest weight."""
        pairs = zip(self.plain.online[0].parameters(), trained.backbone.parameters(), strict=True)  # type: ignore
        gaps, sizes = zip(
            *((float((a - b).detach().abs().max()), float(b.detach().abs().max())) for a, b in pairs), strict=True
        )
        return max(gaps) / max(sizes)


class Turns(Callback):
    """After each epoch of the framework, one of every other loop."""

    def __init__(self, others: dict[str, Bare], batches: int) -> None:
        self.others = others
        self.batches = batches
        self.seconds: dict[str, list[float]] = defaultdict(list)  # a step, by who made it
        self.e_steps: list[float] = []
        self.resumed, self.e_step_before = 0.0, 0.0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        wait(pl_module.device)
        spent = time.perf_counter() - self.resumed
        e_step = pl_module.e_step_seconds - self.e_step_before
        counts = trainer.current_epoch >= WARM_EPOCHS
        if counts:
            self.seconds["framework"].append((spent - e_step) / self.batches)
            self.e_steps.append(e_step)
        for name, other in self.others.items():
            taken = other.epoch() / self.batches
            if counts:
                self.seconds[name].append(taken)
        self.e_step_before = pl_module.e_step_seconds
        self.resumed = time.perf_counter()


class Split(Profiler):
    """Seconds of each part of a step, the device waited for; without the first two epochs, in which graphs are made."""

    def __init__(self, method: ClusteringMethod) -> None:
        super().__init__()
        self.method = method
        self.started: dict[str, float] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.depth, self.epochs = 0, 0
        for network in method.children():
            # Around the call, not by hooks, which would become part of what is compiled.
            call = network._compiled_call_impl or network._call_impl
            network._compiled_call_impl = partial(self.timed, call)

    def timed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call of a network, which may call another."""
        if not replaying():  # inside a part that is being recorded, where nothing may be waited for
            return call(*args, **kwargs)
        self.depth += 1
        if self.depth == 1 and "training_step" in self.started:
            self.start("networks")
        out = call(*args, **kwargs)
        self.depth -= 1
        if self.depth == 0 and "networks" in self.started:
            self.stop("networks")
        return out

    def start(self, action_name: str) -> None:
        wait(self.method.device)
        self.started[action_name.rpartition(".")[2]] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        wait(self.method.device)
        name = action_name.rpartition(".")[2]
        if (began := self.started.pop(name, None)) is not None and self.epochs >= WARM_EPOCHS:
            self.seconds[name] += time.perf_counter() - began
        self.epochs += name == "run_training_epoch"

    def parts(self, steps: int) -> dict[str, float]:
        """Seconds a step."""
        s = {name: seconds / steps for name, seconds in self.seconds.items()}
        views = s.get("on_after_batch_transfer", 0.0) + s.get("transfer_batch_to_device", 0.0)
        parts = {
            "reading": s.get("train_dataloader_next", 0.0),
            "views": views,
            "forward": s.get("networks", 0.0),
            "loss": s["training_step"] - s.get("networks", 0.0),
            "backward": s["backward"],
            "optimiser": s["optimizer_step"] - s["training_step"] - s["backward"],
        }
        return parts | {"other": s["run_training_epoch"] - sum(parts.values())}


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, each on its own: what memory would move if nothing were fused."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        return out


def roof(device: torch.device, low: bool) -> dict[str, float]:
    """Floating-point operations a second of one large product, and bytes a second of a copy, as measured."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if low else torch.float32)
    rows = torch.empty(2**29 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    to = torch.empty_like(rows)
    taken = in_turns({"product": lambda: a @ a, "copy": lambda: to.copy_(rows)}, rounds=7, device=device)
    return {
        "flops_per_second": 2 * size**3 / statistics.median(taken["product"]),
        "bytes_per_second": 2 * len(rows) / statistics.median(taken["copy"]),
    }


def waits(work: Callable[[], object], device: torch.device) -> list[str]:
    """The lines that make the host wait for a GPU, as torch sees them; none is looked for on a CPU."""
    if device.type == "cpu":
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)})


def configuration(name: str, overrides: list[str], batches: int, epochs: int, folder: Path) -> DictConfig:
    """A run of some epochs of a few batches, after the least of the stage before it."""
    cfg = composed(*here(), f"method={name}", f"+trainer.limit_train_batches={batches}", *overrides)
    for node in (cfg, cfg.before):
        if node is not None:
            OmegaConf.update(node, "trainer.max_epochs", epochs if node is cfg else 1, force_add=True)
    cfg.callbacks.evaluation.every_n_epochs = epochs + 1
    cfg.callbacks.progress.line_every_seconds = 1e9
    cfg.report.map_points = 0
    if "warmup_epochs" in cfg.method:
        cfg.method.warmup_epochs = 1  # the whole objective is measured
    (folder / name).mkdir(parents=True)
    earlier = find_earlier_run(cfg, folder / name)
    cfg.start = None if earlier is None else earlier["run"]
    return cfg


def measure(name: str, overrides: list[str], *, batches: int, rounds: int, folder: Path) -> dict[str, Any]:
    """The figures of one method."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    release()  # what the method before has left
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    cfg = configuration(name, overrides, batches, rounds + WARM_EPOCHS, folder)
    work = Work(cfg)
    batches = min(batches, work.datamodule.batches_per_epoch)
    others = {"bare": Bare(Work(cfg), device, batches)}
    if name == "propos":
        others["by hand"] = ByHand(Work(cfg), device, batches)
    turns = Turns(others, batches)
    work.trainer(folder, turns).fit(work.method, work.datamodule)
    seconds = turns.seconds
    figures: dict[str, Any] = {
        "batch_size": cfg.batch_size,
        "weights": sum(p.numel() for p in work.method.backbone.parameters()),
        "seconds_per_step": {who: statistics.median(taken) for who, taken in seconds.items()},
        "framework_over": {who: ratio(seconds["framework"], seconds[who]) for who in others},
        "rounds": dict(seconds),
        "e_step_seconds": statistics.median(turns.e_steps),
        "images_per_second": cfg.batch_size / statistics.median(seconds["framework"]),
        "e_step_of_epoch": statistics.median(turns.e_steps)
        / (cfg.dataset.num_images / cfg.batch_size * statistics.median(seconds["framework"])),
        "peak_memory_bytes": measure_peak_memory(),
    }
    if name == "propos":
        figures["by_hand_weights_differ_by"] = others["by hand"].difference(work.method)  # type: ignore[attr-defined]

    counted = Work(cfg)
    split = Split(counted.method)
    counted.trainer(folder, profiler=split, max_epochs=WARM_EPOCHS + 1).fit(counted.method, counted.datamodule)
    figures["parts"] = split.parts(batches)

    one = others["bare"]
    raw = one.datamodule.read_batch(one.datamodule.epoch_indices(0, one.method.sampling_weights())[0], 0, 0)
    figures["waits"] = waits(lambda: one.step(raw), device)
    with torch.compiler.set_stance("force_eager"), as_written():  # what is compiled or replayed could not be seen
        with FlopCounterMode(display=False) as flops:
            one.step(raw)
        with Traffic() as traffic:
            one.step(raw)
    figures["flops_per_step"], figures["unfused_bytes_per_step"] = flops.get_total_flops(), traffic.bytes
    return figures


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--batches", type=int, default=12, help="of an epoch")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    silence_lightning()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    low = "bf16" in str(composed(*here(), *given.overrides).hardware.precision)
    limits = roof(device, low)
    methods: dict[str, Any] = {}
    failed = []
    for name in given.methods.split(","):
        try:
            with tempfile.TemporaryDirectory() as folder:
                f = measure(name, given.overrides, batches=given.batches, rounds=given.rounds, folder=Path(folder))
        except Exception:  # the others are measured all the same
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
        save({"roof": limits, "batches": given.batches, "methods": methods}, __file__, given.out)
    table(
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
