"""A stand-in for CUDA graphs on a CPU: so that what is made of them is tested where there is no GPU."""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepclust.engine import cuda_graphs


class Tape(TorchDispatchMode):
    """Keeps the operations of a function and does them again on the same memory, as a CUDA graph does."""

    def __init__(self, function, after=None):
        super().__init__()
        self.done = []
        with torch.random.fork_rng([]), self:
            self.result = function()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # the operations are those that autocast has led to
    def replay(self):
        for func, args, kwargs, out in self.done:
            if func.is_view:
                continue
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


@contextmanager
def first_times():
    with torch.random.fork_rng([]):
        yield


def stand_in(monkeypatch):
    """From here on, tensors of the CPU count as a GPU's and tapes as graphs."""
    monkeypatch.setattr(cuda_graphs, "Graph", Tape)
    monkeypatch.setattr(cuda_graphs, "first_times", first_times)
    monkeypatch.setattr(cuda_graphs, "on_gpu", lambda x: isinstance(x, Tensor))
