"""A training on the CPU that cannot fit into the memory is refused, with a batch size that fits."""

import re

import pytest
import torch
from torch import nn

from deepclust.engine import memory_estimate
from deepclust.engine.memory_estimate import measure_saved_bytes, read_available_bytes
from deepclust.errors import InputError
from deepclust.runs import memory_check
from deepclust.runs.memory_check import check_memory
from tests.conftest import compose_train


def configure(*overrides: str):
    cfg = compose_train(*("dataset=folder", "dataset.path=x", "dataset.num_clusters=3", "hardware=cpu"), *overrides)
    cfg.dataset.channels = 3
    return cfg


def test_saved_bytes_are_those_that_backward_needs():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    # The input (3 x 16 x 16) for the weights, and the output of ReLU (8 x 16 x 16), in 4 bytes.
    assert measure_saved_bytes(network, (3, 16, 16)) == (3 + 8) * 16 * 16 * 4
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_a_batch_that_does_not_fit_is_refused_and_the_advice_works(monkeypatch):
    monkeypatch.setattr(memory_check, "read_available_bytes", lambda: 2 * 10**9)
    cfg = configure("backbone=conv_small", "dataset.image_size=64", "batch_size=1024")
    with pytest.raises(InputError, match=r"needs more than .* GB of memory, and 2\.0 GB are left") as caught:
        check_memory(cfg)
    cfg.batch_size = int(re.search(r"batch_size=(\d+)", caught.value.do)[1])
    assert 2 <= cfg.batch_size < 1024
    check_memory(cfg)


@pytest.mark.parametrize("overrides", [["trainer.max_epochs=0"], ["dataset.image_size=16"]])
def test_what_takes_little_is_not_measured(overrides, monkeypatch):
    monkeypatch.setattr(memory_check, "estimate_bytes_of_image", lambda cfg: pytest.fail("measured"))
    check_memory(configure(*overrides))


def test_the_initial_weights_are_those_without_the_check(monkeypatch):
    cfg = configure("backbone=conv_small", "dataset.image_size=64")
    monkeypatch.setattr(memory_check, "VALUES_OF_LARGE_BATCH", 0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_memory(cfg)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    for name, text in (("meminfo", "MemTotal: 9 kB\nMemAvailable:   5000 kB\n"), ("max", "900\n"), ("used", "300\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory_estimate, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory_estimate, "LIMITS", [(str(tmp_path / "max"), str(tmp_path / "used"))])
    assert read_available_bytes() == 600
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 100\nactive_file 50\n")  # of version 2
    assert read_available_bytes() == 700
    (tmp_path / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 200\n")  # of version 1
    assert read_available_bytes() == 800
    (tmp_path / "max").write_text("max\n")
    assert read_available_bytes() == 5000 * 1024
    (tmp_path / "meminfo").write_text("")
    assert read_available_bytes() is None
