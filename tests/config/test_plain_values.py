"""Values of a configuration: they are resolved, and missing ones are named."""

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from deepclust.config.plain_values import resolve_to_dict
from deepclust.errors import InputError


def make_config(text: str) -> DictConfig:
    cfg = OmegaConf.create(text)
    OmegaConf.set_struct(cfg, True)  # as Hydra returns it
    return cfg


def catch_input_error(function: Callable[[], Any]) -> InputError:
    with pytest.raises(InputError) as caught:
        function()
    return caught.value


def test_resolve_to_dict_leaves_nothing_of_omegaconf():
    values = resolve_to_dict(make_config("{a: {b: [1, {c: '${seed}'}]}, seed: 3}"))
    assert values == {"a": {"b": [1, {"c": 3}]}, "seed": 3}
    assert type(values["a"]["b"]) is list and type(values["a"]["b"][1]) is dict


def test_resolve_to_dict_names_missing_values_and_not_keys_that_refer_to_them():
    error = catch_input_error(
        lambda: resolve_to_dict(make_config("{data: {path: '???', again: '${data.path}'}, l: [1, '???']}"))
    )
    assert error.what == "data.path and l.1 have no value"
    assert error.do == "add data.path=VALUE l.1=VALUE"


def test_resolve_to_dict_of_a_section_names_the_whole_key():
    assert (
        catch_input_error(lambda: resolve_to_dict(make_config("{data: {path: '???'}}").data)).what
        == "data.path has no value"
    )


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
            "a ${oc.env:DEEPCLUST_NO_SUCH_VARIABLE} cannot be resolved: "
            "\"Environment variable 'DEEPCLUST_NO_SUCH_VARIABLE' not found\"",
            "give a a value, or correct what it refers to",
        ),
    ],
)
def test_resolve_to_dict_names_a_reference_that_leads_nowhere(text, what, do):
    error = catch_input_error(lambda: resolve_to_dict(make_config(text)))
    assert (error.what, error.do) == (what, do)
