"""Every numeric and boolean key of every configuration, at values that it should not have.

The cases are generated from the configurations, so that a new file in conf/ is covered by being there. An argument that
several files give to the same class, or a key of the same name, is tried once; `make test-all` tries it in each file.
"""

import copy
import functools

import omegaconf.base
import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepclust.config.missing_values import explain_value_error
from tests.conftest import compose_train
from tests.robustness.values import refusal, try_values
from tests.test_configurations import list_options

SMALL = ["method=cc", "dataset=digits", "backbone=conv_small", "views=digits"]
SMALL_SIZES = {"hidden_size": 16, "embedding_size": 8, "bank_size": 64}
REQUIRED = {
    "timm": ["backbone.model_name=resnet18"],
    "folder": ["dataset.path=x", "dataset.num_clusters=2"],
    "arrays": ["dataset.path=x", "dataset.num_clusters=2"],
    "features": ["dataset.path=x", "dataset.num_clusters=2"],
    "webdataset": ["dataset.path=x", "dataset.num_clusters=2"],
    "huggingface": ["dataset.path=x", "dataset.num_clusters=2"],
}
# All but a few are slow tests: most methods take arguments of the same types.
QUICK = ("cc", "kmeans", "propos", "callbacks", "hardware", "logger")
METHODS, GROUPS = (
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]
    for names in (list_options("method"), ["backbone", "views", "dataset", "hardware", "callbacks", "logger"])
)


@pytest.fixture(autouse=True)
def quick_references(monkeypatch):
    """Parse each reference once: most of the time would go into that."""
    monkeypatch.setattr(omegaconf.base, "parse", functools.cache(omegaconf.base.parse))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Ask nobody for pretrained weights: without a network, most of the time would be pauses between attempts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def check_options(group: str, options: list[str], seen: set[tuple[str, str]] | None = None) -> int:
    """Try the keys of a group in each of its options; those in `seen` once, all without it. Return how many cases."""
    num_cases, bad = 0, []
    for option in options:
        others = [override for override in SMALL if not override.startswith(f"{group}=")]
        accelerator = ["hardware.accelerator=auto"] if group == "hardware" else []
        cfg = compose_train(*others, f"{group}={option}", *REQUIRED.get(option, []), *accelerator)
        for method in (cfg.method, OmegaConf.select(cfg, "before.method") or {}):
            method.update({key: size for key, size in SMALL_SIZES.items() if key in method})
        cases, found = try_values(cfg, group, set() if seen is None else seen) if cfg.get(group) else (0, [])
        num_cases += cases
        bad += [f"{group}={option} {line}" for line in found]
    assert not bad, "\n".join([f"{len(bad)} of {num_cases}", *bad])
    return num_cases


SEEN_IN_METHODS: set[tuple[str, str]] = set()


@pytest.mark.parametrize("method", METHODS)
def test_values_of_a_method(method, record_property):
    record_property("cases", check_options("method", [method], SEEN_IN_METHODS))


@pytest.mark.parametrize("group", GROUPS)
def test_values_of_a_group(group, record_property):
    record_property("cases", check_options(group, list_options(group), set()))


@pytest.mark.slow
@pytest.mark.parametrize("group", ["method", "views", "dataset"])
def test_values_of_each_file(group, record_property):
    record_property("cases", check_options(group, list_options(group)))


@pytest.mark.parametrize("section", ["trainer", "evaluation", "report", "multi_view", "earlier"])
def test_values_of_a_section(section, record_property):
    num_cases, bad = try_values(compose_train(*SMALL), section, set())
    record_property("cases", num_cases)
    assert num_cases and not bad, "\n".join(bad)


def test_a_section_that_is_none(record_property):
    """Each section of a run is tried as a number, a text, null and a list: refused, and the message names it."""
    num_cases, bad = 0, []
    composed = compose_train(*SMALL)
    OmegaConf.set_struct(composed, False)
    for section in ("method", "dataset", "dataset.source", "multi_view", "trainer", "hardware", "evaluation", "report"):
        for tried in (0, "abc", None, []):
            num_cases += 1
            cfg = copy.deepcopy(composed)
            OmegaConf.update(cfg, section, tried, merge=False)
            try:
                error = refusal(cfg)
            except OmegaConfBaseException as unresolved:
                error = explain_value_error(unresolved)
            if error is None or section not in str(error):
                bad.append(f"{section}={tried!r}: {error}")
    record_property("cases", num_cases)
    assert not bad, "\n".join(bad)
