"""A fake of CUDA graphs that works on a CPU, so that recording and replay are tested where there is no GPU."""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepclust.engine import graph_recording


class FakeCudaGraph(TorchDispatchMode):
    """Notes the operations of a function and repeats them on the same memory, as a CUDA graph does."""

    def __init__(self, function, after=None):
        super().__init__()
        self.operations = []
        with torch.random.fork_rng([]), self:
            self.result = function()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # what autocast lowers was lowered by operations of its own
    def replay(self):
        for func, args, kwargs, out in self.operations:
            if func.is_view:
                continue
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


@contextmanager
def fake_warm_up():
    with torch.random.fork_rng([]):
        yield


def use_fake_cuda_graphs(monkeypatch):
    """From here on, treat tensors on the CPU as if they were on a GPU, and record them in fake graphs."""
    monkeypatch.setattr(graph_recording, "CudaGraph", FakeCudaGraph)
    monkeypatch.setattr(graph_recording, "warm_up", fake_warm_up)
    monkeypatch.setattr(graph_recording, "is_on_gpu", lambda value: isinstance(value, Tensor))
