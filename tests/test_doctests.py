"""Every public name of the Python door has an example in its docstring, and all examples are right."""

import doctest
import importlib
import inspect
import re
from typing import Any

import pytest

import deepclust
from deepclust import api, estimators, metrics
from deepclust.runs.prediction_object import Prediction

MODULES = [
    "deepclust.api",
    "deepclust.errors",
    "deepclust.estimators",
    "deepclust.metrics",
    "deepclust.result_objects",
    "deepclust.runs.prediction_object",
]
PUBLIC = {
    thing.__qualname__: thing
    for module in (deepclust, api, estimators)
    for name in module.__all__
    if inspect.isclass(thing := getattr(module, name)) or inspect.isfunction(thing)
}
PUBLIC |= {"Prediction": Prediction}
PUBLIC |= {
    name: thing
    for name, thing in vars(metrics).items()
    if inspect.isclass(thing) and thing.__module__ == metrics.__name__ and not inspect.isabstract(thing)
}
EXAMPLES = [
    test
    for name in MODULES
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    if test.examples
]


def test_the_public_names_are_known():
    assert {"train", "cluster", "load_run", "Run", "Clusters", "InputError", "DeepClustering"} <= PUBLIC.keys()
    assert {"ClusteringAccuracy", "NormalizedMutualInformation", "AdjustedRandIndex"} <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_an_example(name: str):
    thing: Any = PUBLIC[name]
    assert [test for test in EXAMPLES if test.name == f"{thing.__module__}.{thing.__qualname__}"], (
        f"the docstring of {thing.__module__}.{name} has no example, or tests/test_doctests.py does not run its module"
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_say_what_is_returned_and_in_which_shape(name: str):
    thing: Any = PUBLIC[name]
    for function in [thing] if inspect.isfunction(thing) else list_own_functions(thing):
        text, where = inspect.getdoc(function) or "", f"the docstring of {name}: {function.__name__}"
        returned = str(inspect.signature(function).return_annotation)
        assert text, f"{where} is missing"
        assert "None" in returned or "eturn" in text or inspect.isclass(thing), f"{where} has no Returns"
        if "ndarray" in returned or "Tensor" in returned:
            assert re.search(r"\((M|N|K|D|F)\b", text), f"{where} has no shape"


def list_own_functions(kind: type) -> list[Any]:
    """Return the public methods and properties of a class that are not those of a class of others."""
    of_others = {name for base in kind.__mro__ if not base.__module__.startswith("deepclust.") for name in vars(base)}
    members = [(name, inspect.getattr_static(kind, name)) for name in dir(kind)]
    found = [
        (name, getattr(member, "fget", None) or getattr(member, "func", None) or member) for name, member in members
    ]
    return [
        function
        for name, function in found
        if not name.startswith("_") and name not in of_others and inspect.isfunction(function)
    ]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_example_is_right(example: doctest.DocTest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    results = doctest.DocTestRunner().run(example, out=told.append)
    assert results.failed == 0, "".join(told)
