"""Building objects from a configuration: results, arguments that are passed on, and refusals."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest
from omegaconf import DictConfig, OmegaConf

from deepclust.config.build import build
from deepclust.config.call_checks import check_calls
from deepclust.errors import InputError

MODULE_NAME = "tests_of_config"


class Part:
    """Keeps its arguments."""

    def __init__(self, *, size: int, rate: float | None = 1.0, kind: Literal["a", "b"] = "a", step: Callable = max):
        self.size, self.rate, self.kind, self.step = size, rate, kind, step


class Whole:
    def __init__(self, part: Any, *, items: Any = None, name: str = "whole"):
        self.part, self.items, self.name = part, items, name

    @classmethod
    def empty(cls) -> "Whole":
        return cls(None)


@dataclasses.dataclass(frozen=True)
class Record:
    value: list


def raise_error(reason: str) -> None:
    if reason == "input":
        raise InputError("what", expected="that", do="do so")
    if reason == "package":
        raise ModuleNotFoundError("no tensorboard here")
    raise TypeError(f"inside: {reason}")


@pytest.fixture(autouse=True)
def importable_module(monkeypatch):
    """Make this file importable by a name that does not depend on how pytest imports it."""
    monkeypatch.setitem(sys.modules, MODULE_NAME, sys.modules[__name__])


def make_config(text: str) -> DictConfig:
    """Return a configuration from YAML, in which `here.` stands for this file."""
    cfg = OmegaConf.create(text.replace("here.", f"{MODULE_NAME}."))
    OmegaConf.set_struct(cfg, True)  # as Hydra returns it
    return cfg


def catch_input_error(function: Callable[[], Any]) -> InputError:
    with pytest.raises(InputError) as caught:
        function()
    return caught.value


# build: results


def test_build_nests_and_passes_lists_and_dicts():
    cfg = make_config("""
        size: 2
        whole:
          _target_: here.Whole
          part: {_target_: here.Part, size: '${size}'}
          items: [{x: 1}, {_target_: here.Part, size: 3}]
    """)
    whole = build(cfg.whole)
    assert whole.part.size == 2 and whole.part.rate == 1.0
    assert type(whole.items) is list and type(whole.items[0]) is dict and whole.items[1].size == 3


def test_build_of_lists_mappings_and_null():
    cfg = make_config("{l: [{_target_: here.Part, size: 1}], d: {a: {_target_: here.Part, size: 2}, b: null}, n: null}")
    assert [part.size for part in build(cfg.l)] == [1]
    built = build(cfg.d)
    assert type(built) is dict and built["a"].size == 2 and built["b"] is None
    assert build(cfg.n) is None and build(None) is None
    assert build({"_target_": f"{MODULE_NAME}.Part", "size": 4}).size == 4
    assert build({"_target_": f"{MODULE_NAME}.Whole.empty"}).name == "whole"


def test_given_values_are_passed_unchanged_and_replace_keys():
    cfg = make_config("whole: {_target_: here.Whole, part: '???', items: {_target_: here.raise_error, reason: never}}")
    items, record = [1, 2], Record([3])
    whole = build(cfg.whole, part=record, items=items)
    assert whole.part is record and whole.items is items


def test_partial_is_called_with_the_remaining_arguments():
    cfg = make_config("""
        whole: {_target_: here.Whole, _partial_: true, name: x}
        outer:
          _target_: here.Whole
          part: {_target_: here.Part, _partial_: true, rate: 0.5}
    """)
    make_whole = build(cfg.whole, items=[1])
    assert isinstance(make_whole, functools.partial)
    whole = make_whole(part=2)
    assert (whole.part, whole.items, whole.name) == (2, [1], "x")
    assert build(cfg.outer).part(size=7).size == 7


def test_build_does_not_change_the_configuration():
    cfg = make_config("whole: {_target_: here.Whole, _partial_: true, part: 1}")
    before = OmegaConf.to_yaml(cfg)
    build(cfg.whole, part=2)
    assert OmegaConf.to_yaml(cfg) == before and OmegaConf.is_struct(cfg.whole)


# build: refusals

PART_CONFIG = "a: {_target_: here.Whole, part: {_target_: here.Part, %s}}"


@pytest.mark.parametrize(
    ("arguments", "what", "expected", "do"),
    [
        ("size: 1, rat: 2", "a.part.rat is no argument of Part", "rate", "write a.part.rate"),
        (
            "size: 1, zebra: 2",
            "a.part.zebra is no argument of Part",
            "one of kind, rate, step",
            "rename or remove it",
        ),
        (
            "rate: 2",
            "Part lacks its argument size",
            "a value for every argument without a default",
            "add a.part.size",
        ),
        ("size: '???'", "a.part.size has no value", None, "add a.part.size=VALUE"),
        ("size: 1.5", "a.part.size is 1.5", "a whole number", "set a.part.size to that"),
        ("size: null", "a.part.size is None", "a whole number", None),
        ("size: true", "a.part.size is True", "a whole number", None),
        ("size: [1]", "a.part.size is [1]", "a whole number", None),
        ("size: 1, rate: .nan", "a.part.rate is nan", "a number or null", None),
        ("size: 1, rate: -.inf", "a.part.rate is -inf", "a number or null", None),
        ("size: 1, rate: fast", "a.part.rate is 'fast'", "a number or null", None),
        ("size: 1, kind: c", "a.part.kind is 'c'", "a or b", None),
        ("size: 1, step: sgd", "a.part.step is 'sgd'", "a section with _target_", None),
        ("size: 1, step: {_target_: heer.f}", None, "the dotted path of a class or function", None),
    ],
)
def test_argument_that_does_not_fit_is_named_by_its_key(arguments, what, expected, do):
    error = catch_input_error(lambda: build(make_config(PART_CONFIG % arguments).a))
    assert what in (None, error.what) and expected in (None, error.expected) and do in (None, error.do)


@pytest.mark.parametrize("arguments", ["size: 1, rate: 2", "size: 1, rate: null", "size: 1, kind: b"])
def test_argument_that_fits_is_accepted(arguments):
    assert build(make_config(PART_CONFIG % arguments).a).part.size == 1


def test_bad_value_is_named_by_the_key_that_holds_it():
    text = "{a: {_target_: here.Part, size: '${b.size}'}, b: {size: '${c}'}, c: many}"
    assert catch_input_error(lambda: build(make_config(text).a)).what == "c is 'many'"


def test_partial_may_lack_arguments_but_not_misspell_them():
    build(make_config("a: {_target_: here.Part, _partial_: true}").a)
    assert (
        "a.siz is no argument"
        in catch_input_error(lambda: build(make_config("a: {_target_: here.Part, _partial_: true, siz: 1}").a)).what
    )


@pytest.mark.parametrize(
    ("target", "what", "do"),
    [
        ("no_such_package.mine.Mine", "there is no module no_such_package", "install no_such_package"),
        ("here.Whol", f"{MODULE_NAME} has no Whol", f"write {MODULE_NAME}.Whole"),
        ("deepclust.eror.InputError", "deepclust has no eror", "write deepclust.errors.InputError"),
        ("here.Whole.emty", f"{MODULE_NAME}.Whole has no emty", f"write {MODULE_NAME}.Whole.empty"),
    ],
)
def test_target_that_does_not_exist_is_named(target, what, do):
    error = catch_input_error(lambda: build(make_config(f"a: {{b: {{_target_: {target}}}}}").a))
    assert error.what.startswith("a.b._target_ is ") and error.what.endswith(what) and error.do.startswith(do)


@pytest.mark.parametrize("node", ["resnet", 3])
def test_value_in_place_of_a_section_is_refused(node):
    assert str(node) in catch_input_error(lambda: build(node)).what


def test_section_without_a_target_takes_no_given_values():
    assert "_target_" in catch_input_error(lambda: build(make_config("a: {b: 1}").a, c=2)).expected


@pytest.mark.parametrize("is_nested", [True, False])
def test_errors_of_constructors_are_raised_unchanged(is_nested):
    text = "{_target_: here.raise_error, reason: %s}"
    text = f"a: {{_target_: here.Whole, part: {text}}}" if is_nested else f"a: {text}"
    assert str(catch_input_error(lambda: build(make_config(text % "input").a))) == "what; expected that; do so"
    with pytest.raises(TypeError, match=r"^inside: fault$") as caught:
        build(make_config(text % "fault").a)
    assert caught.traceback[-1].name == "raise_error"


def test_package_that_is_not_installed_is_a_user_error():
    assert (
        "no tensorboard here"
        in catch_input_error(lambda: build(make_config("a: {_target_: here.raise_error, reason: package}").a)).what
    )


def test_what_hydra_never_calls_is_said_in_whole():
    error = catch_input_error(lambda: build({"_target_": "os.system", "command": "true"}))
    assert error.what.startswith("Target 'os.system' is blocklisted because it allows config data to control")
    assert error.what.endswith("HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE.")


@pytest.mark.parametrize("is_nested", [True, False])
def test_refusals_of_other_packages_are_user_errors_that_name_the_section(is_nested):
    text = "{_target_: torch.nn.Conv2d, in_channels: 3, out_channels: 4, kernel_size: 1, groups: 2}"
    cfg = make_config(f"a: {{_target_: here.Whole, part: {text}}}" if is_nested else f"a: {text}")
    error = catch_input_error(lambda: build(cfg.a))
    assert f"Conv2d refuses the section {'a.part' if is_nested else 'a'}: in_channels" in error.what


def test_lists_and_items_beside_sections_are_checked():
    text = "a: {_target_: deepclust.views.multiview.MultiView, names: [x], mean: null, std: null, pipelines: {x: [%s]}}"
    resize = "{_target_: deepclust.views.geometry.Resize, size: 8}"
    cfg = make_config(text % f"{resize}, 3")
    assert catch_input_error(lambda: check_calls(cfg.a)).what == "a.pipelines.x.1 is 3"
    check_calls(make_config(text % resize).a)


def test_function_without_a_signature_is_called_unchecked():
    assert build({"_target_": "builtins.dict", "a": 1}) == {"a": 1}
    assert list(itertools.islice(build({"_target_": "itertools.count", "start": 3}), 2)) == [3, 4]
