"""Values of a configuration checked by pydantic against the type of an argument, and types told in words.

A value is what YAML can say. Nothing is converted: true is no number, "no" is not false, and a list is not a scalar. A
whole number serves as a float. NaN and infinity are no numbers.
"""

import functools
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen, Predicate
from pydantic import ConfigDict, TypeAdapter, ValidationError

from deepclust.errors import InputError
from deepclust.number_types import LARGEST_FLOAT, LARGEST_INT

RULES = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text", type(None): "null"}
WORDS_FOR_NO = {"no", "off", "none", "false", "n", "f", "0"}
WORDS_FOR_YES = {"yes", "on", "true", "y", "t", "1"}


def check_value(key: str, value: Any, annotation: Any) -> None:
    """Check that `value`, which stands at `key`, is of the type of an argument.

    A section with `_target_` is not checked, since only calling it tells what it makes; what stands beside it is.

    Raises:
        InputError: if it is not; it names the key.
    """
    if is_section(value):
        return
    if holds_section(value):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        kind = Mapping if isinstance(value, dict) else Sequence
        of_items = [typing.get_args(a)[-1] for a in iterate_alternatives(annotation) if is_generic(a, kind)]
        for name, item in items if len(of_items) == 1 else ():
            check_value(f"{key}.{name}", item, of_items[0])
        return
    path = find_error(value, annotation)
    if path is None:
        return
    for name in path:
        key, value, annotation = f"{key}.{name}", value[name], item_type(annotation)
    shows_limits = isinstance(value, int | float) and abs(value) > LARGEST_INT
    do = f"set {key} to that"
    if bool in iterate_alternatives(annotation) and (word := str(value).lower()) in WORDS_FOR_NO | WORDS_FOR_YES:
        do = f"set {key}={'false' if word in WORDS_FOR_NO else 'true'}"
    raise InputError(f"{key} is {value!r}", expected=describe_type(annotation, shows_limits=shows_limits), do=do)


def find_error(value: Any, annotation: Any) -> list[Any] | None:
    """Return the indices and names that lead into `value` to the first error; None if the value fits.

    It is also None for an annotation that pydantic cannot read.
    """
    adapter = make_adapter(annotation)
    if adapter is None:
        return None
    # As JSON, in which a list can become a tuple, and text a path, without any other conversion.
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "replace")
    try:
        adapter.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        path: list[Any] = []
        place = value
        for name in first["loc"]:
            is_inside = (
                name in place if isinstance(place, dict) else isinstance(place, list) and name in range(len(place))
            )
            if not is_inside:
                break
            path.append(name)
            place = place[name]
        return path
    return None


def make_adapter(annotation: Any) -> TypeAdapter | None:
    """Return pydantic's check of an annotation; None where there is none, or it names what cannot be found."""
    try:
        return make_known_adapter(annotation)
    except Exception:  # annotations may hold any expression
        return None


@functools.cache
def make_known_adapter(annotation: Any) -> TypeAdapter:
    """Return pydantic's check of an annotation, made once for each."""
    return TypeAdapter(annotation, config=RULES)


def is_section(value: Any) -> bool:
    """Return whether a value describes an object."""
    return isinstance(value, dict) and "_target_" in value


def holds_section(value: Any) -> bool:
    """Return whether a value describes an object, or holds something that does."""
    if isinstance(value, dict):
        return is_section(value) or any(map(holds_section, value.values()))
    return isinstance(value, list) and any(map(holds_section, value))


def iterate_alternatives(annotation: Any) -> Iterator[Any]:
    """Iterate over the members of a union; of another annotation, over itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from iterate_alternatives(member)
    else:
        yield annotation


def item_type(annotation: Any) -> Any:
    """Return the type of the items of a list or mapping; the annotation itself where it is none of these."""
    for alternative in iterate_alternatives(annotation):
        is_annotated = typing.get_origin(alternative) is typing.Annotated
        kind = typing.get_args(alternative)[0] if is_annotated else alternative
        if is_generic(kind, Mapping) or is_generic(kind, Sequence):
            return typing.get_args(kind)[-1]
    return annotation


def is_generic(annotation: Any, kind: type) -> bool:
    """Return whether an annotation is `kind` of something, such as Sequence[int]."""
    origin = typing.get_origin(annotation)
    return isinstance(origin, type) and issubclass(origin, kind)


# In words ---------------------------------------------------------------------------------------------------------


def describe_type(annotation: Any, *, shows_limits: bool = False) -> str:
    """Say in words which values an annotation allows; `shows_limits`: also those of 32 or 64 bits."""
    names = [describe_alternative(a, shows_limits) for a in iterate_alternatives(annotation)]
    return " or ".join(dict.fromkeys(names))


def describe_alternative(annotation: Any, shows_limits: bool) -> str:
    """Say in words which values an annotation allows that is no union."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        kind, *limits = arguments
        text = describe_type(kind, shows_limits=shows_limits)
        if kind in (int, float):
            return f"{text}{describe_bounds(limits, kind, shows_limits)}"
        if any(isinstance(limit, Predicate) for limit in limits):
            text += ", the smaller first"
        if MinLen(1) in limits:
            return (
                text.replace("a list", "a list that is not empty", 1)
                if kind is not str
                else f"{text} that is not empty"
            )
        return text
    if origin is Literal:
        return " or ".join(str(option) for option in arguments)
    if origin is tuple:
        return f"a list of {len(arguments)}, each {describe_type(arguments[0], shows_limits=shows_limits)}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each item {describe_type(arguments[0], shows_limits=shows_limits)}"
    if (origin or annotation) is Callable or annotation not in NAMES:
        return "a section with _target_"
    return NAMES[annotation]


def describe_bounds(limits: Sequence[Any], kind: type, shows_limits: bool) -> str:
    """Say in words between which bounds a number has to be, as the end of "a number"."""
    bounds = {type(limit): astuple(limit)[0] for limit in limits if isinstance(limit, Ge | Gt | Le | Lt)}
    largest, largest_text = (LARGEST_INT, "2^63 - 1") if kind is int else (LARGEST_FLOAT, str(LARGEST_FLOAT))
    if not shows_limits:
        bounds = {bound: number for bound, number in bounds.items() if abs(number) < largest}
    texts = {Ge: ", {} or more", Gt: " above {}", Le: " at most {}", Lt: " below {}"}
    said = [texts[b].format(largest_text if number == largest else number) for b, number in bounds.items()]
    return " and".join(said)
