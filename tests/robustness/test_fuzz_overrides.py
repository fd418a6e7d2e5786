"""Random overrides of `train`: whatever is written, it is accepted or refused in one line, and never a traceback."""

import functools

import omegaconf.base
import pytest
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepclust.config.composition import COMPOSITION_ERRORS
from deepclust.config.explain_errors import explain_composition_error
from deepclust.config.keys import list_keys
from deepclust.errors import InputError
from tests.conftest import compose_train
from tests.robustness.values import refusal
from tests.test_configurations import list_options

BASE = ["dataset=digits", "backbone=conv_small", "views=digits"]
MAX_EXAMPLES = 100  # of each test; all of them are cases
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 1, 0.5, 1e308]))
scalars = st.one_of(numbers, st.booleans(), st.none(), st.text("abc_.${}[]=,:'\\ ", max_size=6))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner)
)


@pytest.fixture(autouse=True)
def count_cases(record_property):
    record_property("cases", MAX_EXAMPLES)


@functools.cache
def keys_of(method: str) -> list[str]:
    return [key for key in list_keys(compose_train(f"method={method}", *BASE)) if not key.startswith("hydra")]


@pytest.mark.slow
@settings(max_examples=MAX_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_of_any_keys_is_accepted_or_refused_in_one_line(data):
    omegaconf.base.parse = functools.cache(getattr(omegaconf.base.parse, "__wrapped__", omegaconf.base.parse))
    method = data.draw(st.sampled_from(list_options("method")))
    cfg = compose_train(f"method={method}", *BASE)
    OmegaConf.set_struct(cfg, False)
    for key in data.draw(st.lists(st.sampled_from(keys_of(method)), min_size=1, max_size=3)):
        try:
            OmegaConf.update(cfg, key, data.draw(values), force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError):  # Hydra would refuse it while composing
            continue
    try:
        error = refusal(cfg)
    except OmegaConfBaseException:  # the command line explains these (`explain_value_error`)
        return
    assert error is None or (isinstance(error, InputError) and str(error).count("\n") == 0)


@pytest.mark.slow
@settings(max_examples=MAX_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    key=st.sampled_from(["method.lr", "seed", "views", "method", "trainer", "x.y", "dataset.mean"]),
    text=st.text(max_size=12),
)
def test_any_text_on_the_command_line_composes_or_is_explained(key, text):
    override = f"{key}={text}"
    try:
        refusal(compose_train(*BASE, override))
    except (HydraException, *COMPOSITION_ERRORS) as error:
        explained = explain_composition_error(
            error, command="deepclust train", config_name="train", config_dir=None, overrides=[*BASE, override]
        )
        assert "\n" not in " ".join(str(explained).split()) and str(explained).count("; ") >= 2
