"""The calls that a configuration describes, checked against the signatures of their targets before they are made."""

import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf

from deepclust.config.foreign_types import find_foreign_types
from deepclust.config.missing_values import missing_value_error
from deepclust.config.suggestions import find_nearest_name
from deepclust.config.targets import locate_target
from deepclust.config.type_checks import check_value
from deepclust.errors import InputError

HYDRA_KEYS: dict[str, Any] = {  # are not arguments
    "_target_": str,
    "_args_": list[Any],
    "_partial_": bool,
    "_recursive_": bool,
    "_convert_": Literal["none", "partial", "object", "all"],
}


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
    """Check the arguments of one section with `_target_` against the signature.

    Raises:
        InputError: as `check_calls` does, for this section alone.
    """
    for name, annotation in HYDRA_KEYS.items():
        if name in node:
            check_argument(node, name, None, annotation)
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
    foreign_types = find_foreign_types(target)
    for name in named:
        if name in by_name or name in foreign_types:
            known = by_name.get(name)
            annotation = foreign_types.get(name, inspect.Parameter.empty if known is None else known.annotation)
            check_argument(node, name, known, annotation)


def check_argument(node: DictConfig, name: str, parameter: inspect.Parameter | None, annotation: Any) -> None:
    """Check the value of an argument against its type. The default of the argument passes."""
    value = node[name]
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if annotation is inspect.Parameter.empty or (parameter is not None and value is parameter.default):
        return
    check_value(find_source_key(node, name), value, annotation)


def find_source_key(node: Any, name: Any) -> str:
    """Return the key to change for another value of `name`: where its reference leads, or its own."""
    reference = re.fullmatch(r"\$\{(\.*)([A-Za-z_][\w.]*)\}", str(node._get_node(name)._value()))
    if reference is None:
        return node._get_full_key(name)
    dots, path = reference.groups()
    section, _, last = path.rpartition(".")
    place = node if dots else node._get_root()
    for _ in dots[1:]:
        place = place._get_parent()
    if section:
        place = OmegaConf.select(place, section)
    return find_source_key(place, last)


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
