"""Random numbers by what they are for."""

import traceback

import pytest
import torch

from deepclust.engine.randomness import seed_global


def test_the_global_stream_hangs_on_the_key_and_costs_no_stack_trace(monkeypatch):
    monkeypatch.setattr(traceback, "format_stack", lambda *_: pytest.fail("a stack trace was formatted"))
    cpu, drawn = torch.device("cpu"), []
    for key in ((0, "layers", 1), (0, "layers", 1), (0, "layers", 2)):
        seed_global(cpu, *key)
        drawn.append(torch.rand(4))
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])
