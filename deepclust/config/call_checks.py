"""The calls that a configuration describes, checked against the signatures of their targets before they are made."""

import inspect
import re
import types
import typing
from collections.abc import Callable, Collection
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf

from deepclust.config.keys import iterate_entries
from deepclust.config.suggestions import find_nearest_name
from deepclust.config.targets import locate_target
from deepclust.config.value_errors import missing_value_error
from deepclust.errors import InputError

HYDRA_KEYS = {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}  # are not arguments
SCALAR_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def check_calls(node: Any, given: Collection[str] = ()) -> None:
    """Check every call that `node` describes, sections within sections too; `given` names what is passed besides.

    Raises:
        InputError: for a missing or unknown argument, or a value that the annotation rules out; it names the key.
    """
    if isinstance(node, ListConfig):
        names: list[Any] = list(range(len(node)))
    elif isinstance(node, DictConfig):
        names = [name for name in node if name not in given]
    else:
        return
    for name in names:
        if OmegaConf.is_missing(node, name):
            raise missing_value_error(node._get_full_key(name))
    if "_target_" in node and isinstance(node, DictConfig):
        check_arguments(node, given)
        if not node.get("_recursive_", True):
            return
    for name in names:
        check_calls(node[name])


def check_arguments(node: DictConfig, given: Collection[str]) -> None:
    """Check the arguments of one section with `_target_` against the signature."""
    target = locate_target(str(node._target_), node._get_full_key("_target_"))
    signature = read_signature(target)
    if signature is None:
        return
    called = getattr(target, "__qualname__", node._target_)
    parameters = list(signature.parameters.values())
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    named = [str(name) for name in node if name not in HYDRA_KEYS and name not in given]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in named:
            if name not in by_name:
                free = sorted(by_name.keys() - set(named) - set(given))
                nearest = find_nearest_name(name, free)
                raise InputError(
                    f"{node._get_full_key(name)} is no argument of {called}",
                    expected=nearest or f"one of {', '.join(free)}",
                    do=f"write {node._get_full_key(nearest)}" if nearest else "rename or remove it",
                )
    if not node.get("_partial_", False):
        num_positional = len(node.get("_args_", ()))
        for name, parameter in list(by_name.items())[num_positional:]:
            if parameter.default is parameter.empty and name not in named and name not in given:
                raise InputError(
                    f"{called} lacks its argument {name}",
                    expected="a value for every argument without a default",
                    do=f"add {node._get_full_key(name)}",
                )
    for name in named:
        if name in by_name:
            check_argument_type(find_source_key(node, name), node[name], by_name[name])


def check_argument_type(key: str, value: Any, parameter: inspect.Parameter) -> None:
    """Refuse a number, text or null that the annotation rules out. Other values and annotations pass."""
    if not isinstance(value, tuple(SCALAR_NAMES)) or value is parameter.default:
        return
    accepted = []
    for kind in list_alternatives(parameter.annotation):
        if kind in SCALAR_NAMES:
            is_whole = kind in (int, float) and isinstance(value, int)
            fits, name = isinstance(value, kind) or is_whole, SCALAR_NAMES[kind]
        elif typing.get_origin(kind) is Literal:
            options = typing.get_args(kind)
            fits, name = value in options, " or ".join(str(option) for option in options)
        elif (typing.get_origin(kind) or kind) is Callable:
            fits, name = False, "a section with _target_"
        else:
            return
        if fits:
            return
        accepted.append(name)
    raise InputError(f"{key} is {value!r}", expected=" or ".join(accepted), do=f"set {key} to that")


def find_source_key(node: Any, name: str) -> str:
    """Return the key to change for another value of `name`: where its reference leads, or its own."""
    reference = re.fullmatch(r"\$\{([A-Za-z_][\w.]*)\}", str(dict(iterate_entries(OmegaConf.to_container(node)))[name]))
    if reference is None:
        return node._get_full_key(name)
    section, _, last = reference[1].rpartition(".")
    return find_source_key(OmegaConf.select(node._get_root(), section) if section else node._get_root(), last)


def list_alternatives(annotation: Any) -> list[Any]:
    """List the members of a union, or the annotation itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for member in typing.get_args(annotation) for kind in list_alternatives(member)]
    return [annotation]


def read_signature(target: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature, with annotations evaluated where that is possible; None where there is none to be had."""
    try:
        return inspect.signature(target, eval_str=True)
    except Exception:  # annotations may hold any expression, and names that only type checkers see
        pass
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):  # not callable (Hydra says so), or written in C
        return None
