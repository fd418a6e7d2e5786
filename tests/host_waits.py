"""Finds, on the CPU, where a step would wait for a GPU and where the host has a part in making views on one."""

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
from deepclust.engine.cuda_graphs import ReplayedParts, Within, as_written
from deepclust.engine.randomness import generator
from deepclust.views.multiview import MultiView

PACKAGE = Path(deepclust.__file__).parent
ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "repeat_interleave"}
NOT_ON_A_GPU = {"one_hot"}  # torch looks at the labels on a CPU only


class HostWaits(TorchDispatchMode):
    """Notes in `found` the lines that ask for values which hang on `tensors`, as if those lay on a device."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.device: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice
        self.found: set[str] = set()
        self.put_on_device(tensors)

    def put_on_device(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.device[storage._cdata] = storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(t.untyped_storage()._cdata in self.device for t in given)
        if on_device and asks(func.overloadpacket.__name__, args):
            lines = [f for f in traceback.extract_stack() if PACKAGE in Path(f.filename).parents]
            if lines and not any(name in str(lines[-1].line) for name in NOT_ON_A_GPU):
                self.found.add(f"{Path(lines[-1].filename).name}: {lines[-1].line}")
        out = func(*args, **(kwargs or {}))
        if on_device:
            self.put_on_device([t for t in tree_leaves(out) if isinstance(t, Tensor)])
        return out


def asks(name: str, args: tuple) -> bool:
    """Whether an operation tells the host something: a value, or how many rows a mask picks."""
    masks = name in ("index", "index_put", "index_put_", "_index_put_impl_")
    return name in ASKING or (masks and any(i is not None and i.dtype == torch.bool for i in args[1]))


class HostWork(TorchDispatchMode):
    """Notes in `found` what a CUDA graph cannot hold: operations that ask for values or meet a tensor of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if asks(func.overloadpacket.__name__, args):
            self.found.add(str(func))
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t.device.type == "cpu" for t in tree_leaves((args, kwargs, out))):
            self.found.add(str(func))
        return out


def host_work(views: MultiView, images: Tensor, monkeypatch) -> tuple[tuple[Tensor, ...], set[str]]:
    """The views of images on a GPU, as tensors without values, and what the host has to do with making them there."""
    work = HostWork()

    def prepared(key, render, *tensors):
        with FakeTensorMode():
            there = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]
            with work:
                return render(*there)

    monkeypatch.setattr(MultiView, "_in_pieces", MultiView._at_once)
    monkeypatch.setattr(views, "prepared", prepared)
    n = len(images)
    return views(images, generator(0), rows=slice(0, n), total=n), work.found


def watch_parts(monkeypatch) -> dict[str, set[str]]:
    """By part of a method's steps, from here on: what the host would have to do with it on a GPU, forth and back."""
    found: dict[str, set[str]] = {}
    call = ReplayedParts.__call__

    def there(t):
        if t is None:
            return None
        return torch.empty(t.shape, dtype=t.dtype, device="meta", requires_grad=t.requires_grad)

    def watched(parts, function, method, tensors, values):
        state = {f"network.{name}": there(t) for name, t in [*method.named_parameters(), *method.named_buffers()]}
        within = Within(lambda *given: function(method, *given), method)
        without_autocast = patch.object(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know "meta"
        with HostWork() as work, without_autocast, as_written():
            outputs = functional_call(within, state, tuple(map(there, tensors)))
            learning = [o for o in tree_leaves(outputs) if o.requires_grad]
            torch.autograd.backward(learning, [torch.empty_like(o) for o in learning])
        found.setdefault(function.__name__, set()).update(work.found)
        return call(parts, function, method, tensors, values)

    monkeypatch.setattr(ReplayedParts, "__call__", watched)
    return found
