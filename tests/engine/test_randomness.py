"""Seeds that are derived from keys."""

import traceback

import pytest
import torch

from deepclust.engine.randomness import seed_global_generators


def test_the_key_seeds_the_global_generator_without_formatting_a_stack_trace(monkeypatch):
    monkeypatch.setattr(traceback, "format_stack", lambda *_: pytest.fail("a stack trace was formatted"))
    cpu, drawn = torch.device("cpu"), []
    for key in ((0, "layers", 1), (0, "layers", 1), (0, "layers", 2)):
        seed_global_generators(cpu, *key)
        drawn.append(torch.rand(4))
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])
