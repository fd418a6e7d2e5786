"""Recording a CUDA graph; what recordings compute is tested in test_cuda_graphs.py."""

import gc
from contextlib import nullcontext

import torch

from deepclust.engine.graph_recording import CudaGraph


def test_no_garbage_is_collected_during_a_recording(monkeypatch):
    """The collector could destroy an old graph, and that would end the recording."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    assert CudaGraph(gc.isenabled).result is False
    assert gc.isenabled()
