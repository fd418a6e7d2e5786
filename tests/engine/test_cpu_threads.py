"""The number of CPU threads follows from the run, never from the load; what the user names wins."""

import pytest
import torch

from deepclust.engine import cpu_threads
from deepclust.engine.cpu_threads import choose_num_threads, describe_num_threads, num_threads_set

SMALL, LARGE = 256 * 2 * 8 * 8, 256 * 2 * 3 * 32 * 32  # values in a batch of digits, and of CIFAR


@pytest.fixture
def no_variables(monkeypatch):
    for name in cpu_threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    return monkeypatch


@pytest.mark.parametrize("load", [0.0, 100.0])
def test_small_batches_take_one_thread_and_large_ones_all(no_variables, load):
    no_variables.setattr(cpu_threads.os, "getloadavg", lambda: (load, load, load))
    assert choose_num_threads("auto", values_in_batch=SMALL) == 1
    assert choose_num_threads("auto", values_in_batch=LARGE) == 8


def test_what_the_user_names_wins(no_variables):
    assert choose_num_threads(3, values_in_batch=SMALL, recorded=1) == 3
    no_variables.setenv("OMP_NUM_THREADS", "8")
    assert choose_num_threads("auto", values_in_batch=SMALL, recorded=1) == 8
    assert describe_num_threads(8, "auto") is None


def test_a_run_that_goes_on_takes_what_it_began_with(no_variables):
    assert choose_num_threads("auto", values_in_batch=SMALL, recorded=4) == 4


def test_what_was_chosen_is_told_with_the_load_of_a_busy_machine(no_variables):
    assert describe_num_threads(1, "auto") == "training in 1 CPU thread (hardware.threads=N takes N)"
    assert describe_num_threads(1, 1) is None
    no_variables.setattr(cpu_threads.os, "getloadavg", lambda: (100.0, 100.0, 100.0))
    assert "busy" in describe_num_threads(8, "auto") and "busy" not in describe_num_threads(1, "auto")


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with num_threads_set(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_run_records_its_threads_and_takes_them_again(no_variables):
    from deepclust.config.build import build
    from deepclust.runs.resolve_config import resolve_config
    from tests.conftest import compose_train

    cfg = compose_train("dataset=digits", "hardware=cpu")
    images = build(cfg.dataset.source)
    assert resolve_config(cfg, images, None)[0].hardware.threads == 1
    assert resolve_config(cfg, images, None, {"hardware": {"threads": 5}})[0].hardware.threads == 5
