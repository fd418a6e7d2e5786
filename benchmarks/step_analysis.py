"""Where the time of a training step goes: its parts, its arithmetic and memory traffic, and waits for the GPU."""

import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from measure import synchronize, time_interleaved
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_loops import UNTIMED_EPOCHS

from deepclust.engine.cuda_graphs import is_replay_enabled
from deepclust.methods.base import ClusteringMethod

PARTS = ["reading", "views", "forward", "loss", "backward", "optimiser", "other"]


class StepPartsProfiler(Profiler):
    """Seconds of each part of a step, with a wait for the device after each part; the untimed epochs are left out."""

    def __init__(self, method: ClusteringMethod) -> None:
        super().__init__()
        self.method = method
        self.start_times: dict[str, float] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.call_depth, self.num_epochs = 0, 0
        for network in method.children():
            # The call is wrapped because hooks would become part of what is compiled.
            call = network._compiled_call_impl or network._call_impl
            network._compiled_call_impl = partial(self.call_timed, call)

    def call_timed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a network and add its seconds to "networks"; a network that it calls is not counted twice."""
        if not is_replay_enabled():  # a graph is being recorded, and nothing may wait for the device meanwhile
            return call(*args, **kwargs)
        self.call_depth += 1
        if self.call_depth == 1 and "training_step" in self.start_times:
            self.start("networks")
        out = call(*args, **kwargs)
        self.call_depth -= 1
        if self.call_depth == 0 and "networks" in self.start_times:
            self.stop("networks")
        return out

    def start(self, action_name: str) -> None:
        synchronize(self.method.device)
        self.start_times[action_name.rpartition(".")[2]] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        synchronize(self.method.device)
        name = action_name.rpartition(".")[2]
        if (start := self.start_times.pop(name, None)) is not None and self.num_epochs >= UNTIMED_EPOCHS:
            self.seconds[name] += time.perf_counter() - start
        self.num_epochs += name == "run_training_epoch"

    def seconds_of_parts(self, num_steps: int) -> dict[str, float]:
        """Return the seconds of each of PARTS in one step, as the mean of the `num_steps` steps that were timed."""
        s = {name: seconds / num_steps for name, seconds in self.seconds.items()}
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


class MemoryTrafficMode(TorchDispatchMode):
    """Counts the bytes that operations read and write, as if none of them were fused."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        return out


def measure_device_limits(device: torch.device, *, use_bfloat16: bool) -> dict[str, float]:
    """Return the floating-point operations a second of one large product, and the bytes a second of a large copy."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if use_bfloat16 else torch.float32)
    source = torch.empty(2**29 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    functions = {"product": lambda: a @ a, "copy": lambda: destination.copy_(source)}
    seconds = time_interleaved(functions, rounds=7, device=device)
    return {
        "flops_per_second": 2 * size**3 / statistics.median(seconds["product"]),
        "bytes_per_second": 2 * len(source) / statistics.median(seconds["copy"]),
    }


def find_device_waits(function: Callable[[], object], device: torch.device) -> list[str]:
    """Return the lines, as FILE:LINE, at which `function` makes the host wait for a GPU; none on a CPU."""
    if device.type == "cpu":
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)})
