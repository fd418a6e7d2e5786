"""Finds, without a GPU, where a training step would wait for one and what a CUDA graph could not hold of a step."""

import traceback
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deepclust
from deepclust.engine.cuda_graphs import FunctionAsModule, ReplayedParts, disable_replay
from deepclust.engine.randomness import make_generator
from deepclust.views.multiview import MultiView

PACKAGE = Path(deepclust.__file__).parent
VALUE_READING_OPERATIONS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "equal",
    "repeat_interleave",
}
ONLY_ON_CPU = {"one_hot"}  # functions that read values of tensors on a CPU only


class HostWaits(TorchDispatchMode):
    """Notes in `lines` where the package reads values computed from `tensors`, as if these were on a GPU."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.device_storages: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address is used twice
        self.lines: set[str] = set()
        self.put_on_device(tensors)

    def put_on_device(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.device_storages[storage._cdata] = storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(t.untyped_storage()._cdata in self.device_storages for t in given)
        if on_device and reads_values(func.overloadpacket.__name__, args):
            frames = [f for f in traceback.extract_stack() if PACKAGE in Path(f.filename).parents]
            if frames and not any(name in str(frames[-1].line) for name in ONLY_ON_CPU):
                self.lines.add(f"{Path(frames[-1].filename).name}: {frames[-1].line}")
        out = func(*args, **(kwargs or {}))
        if on_device:
            self.put_on_device([t for t in tree_leaves(out) if isinstance(t, Tensor)])
        return out


def reads_values(name: str, args: tuple) -> bool:
    """Return whether the host needs values of an operation: a result, or how many rows a mask picks."""
    may_use_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_")
    return name in VALUE_READING_OPERATIONS or (
        may_use_mask and any(i is not None and i.dtype == torch.bool for i in args[1])
    )


class HostOperations(TorchDispatchMode):
    """Notes in `names` the operations that no CUDA graph can hold: they read values or have a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if reads_values(func.overloadpacket.__name__, args):
            self.names.add(str(func))
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t.device.type == "cpu" for t in tree_leaves((args, kwargs, out))):
            self.names.add(str(func))
        return out


def find_host_operations_in_views(views: MultiView, images: Tensor, monkeypatch) -> tuple[tuple[Tensor, ...], set[str]]:
    """Make the views of `images` on an imagined GPU; return them, without values, and the names of host operations."""
    operations = HostOperations()

    def run_on_fake_gpu(key, render, *tensors):
        with FakeTensorMode():
            on_gpu = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]
            with operations:
                return render(*on_gpu)

    monkeypatch.setattr(MultiView, "_render_in_pieces", MultiView._render_all_at_once)
    monkeypatch.setattr(views, "run_on_device", run_on_fake_gpu)
    n = len(images)
    return views(images, make_generator(0), rows=slice(0, n), global_batch_size=n), operations.names


def watch_host_operations_in_parts(monkeypatch) -> dict[str, set[str]]:
    """Watch the replayable parts of methods from here on; return a dict that fills with their host operations by part.

    Each part is also run, forward and backward, on tensors without values that stand for those on a GPU.
    """
    names_by_part: dict[str, set[str]] = {}
    call = ReplayedParts.__call__

    def without_values(t):
        if t is None:
            return None
        return torch.empty(t.shape, dtype=t.dtype, device="meta", requires_grad=t.requires_grad)

    def watched_call(parts, function, method, tensors, constants):
        network_tensors = [*method.named_parameters(), *method.named_buffers()]
        state = {f"network.{name}": without_values(t) for name, t in network_tensors}
        module = FunctionAsModule(lambda *given: function(method, *given), method)
        no_autocast = patch.object(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know "meta"
        with HostOperations() as operations, no_autocast, disable_replay():
            outputs = functional_call(module, state, tuple(map(without_values, tensors)))
            differentiable = [o for o in tree_leaves(outputs) if o.requires_grad]
            torch.autograd.backward(differentiable, [torch.empty_like(o) for o in differentiable])
        names_by_part.setdefault(function.__name__, set()).update(operations.names)
        return call(parts, function, method, tensors, constants)

    monkeypatch.setattr(ReplayedParts, "__call__", watched_call)
    return names_by_part
