"""Values of a configuration: resolved, named where they are open, and checked before any work."""

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from deepclust.config.values import check_whole_numbers, resolve_to_dict
from deepclust.errors import InputError


def config(text: str) -> DictConfig:
    cfg = OmegaConf.create(text)
    OmegaConf.set_struct(cfg, True)  # as Hydra hands it out
    return cfg


def refusal(function: Callable[[], Any]) -> InputError:
    with pytest.raises(InputError) as caught:
        function()
    return caught.value


def test_plain_resolves_and_leaves_nothing_of_omegaconf():
    values = resolve_to_dict(config("{a: {b: [1, {c: '${seed}'}]}, seed: 3}"))
    assert values == {"a": {"b": [1, {"c": 3}]}, "seed": 3}
    assert type(values["a"]["b"]) is list and type(values["a"]["b"][1]) is dict


def test_plain_names_every_open_key_and_not_those_that_refer_to_it():
    error = refusal(lambda: resolve_to_dict(config("{data: {path: '???', again: '${data.path}'}, l: [1, '???']}")))
    assert error.what == "data.path and l.1 have no value"
    assert error.do == "add data.path=VALUE l.1=VALUE"


def test_plain_of_a_section_names_the_whole_key():
    assert refusal(lambda: resolve_to_dict(config("{data: {path: '???'}}").data)).what == "data.path has no value"


@pytest.mark.parametrize(
    ("text", "what", "do"),
    [
        (
            "{a: {b: '${trainer.max_epoch}'}, trainer: {max_epochs: 1}}",
            "a.b refers to trainer.max_epoch, which does not exist",
            "write ${trainer.max_epochs}",
        ),
        (
            "a: ${oc.env:DEEPCLUST_NO_SUCH_VARIABLE}",
            "a cannot be resolved: \"Environment variable 'DEEPCLUST_NO_SUCH_VARIABLE' not found\"",
            "give a a value, or correct what it refers to",
        ),
    ],
)
def test_plain_says_which_reference_leads_nowhere(text, what, do):
    error = refusal(lambda: resolve_to_dict(config(text)))
    assert (error.what, error.do) == (what, do)


def test_numbers_that_are_worked_out_later_and_none_epochs_pass():
    check_whole_numbers(
        {"seed": -1, "batch_size": 1, "trainer": {"max_epochs": 0}, "network": {"trainer": {"max_epochs": None}}}
    )
    error = refusal(lambda: check_whole_numbers({"network": {"batch_size": True}}))
    assert error.what == "network.batch_size is True"
