"""Objects out of a configuration: what a section with `_target_` describes is found, checked and built.

All of Hydra's `instantiate` goes through `build`: later releases want trusted targets named at each call.
"""

import copy
import functools
import re
import sys
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from deepclust.config.call_checks import check_calls
from deepclust.config.targets import missing_package_error
from deepclust.errors import InputError

# Their constructors are called with what a user writes, and refuse it with errors of their own.
FOREIGN_PACKAGES = {"lightning", "pytorch_lightning", "torch", "torchvision", "timm", *sys.stdlib_module_names}


def build(node: Any, **given: Any) -> Any:
    """Build what a section of the configuration describes: the object of its `_target_`, or a list or dict of such.

    Nested sections are built first. Lists and mappings reach the constructors as plain `list` and `dict`. `given`
    replaces keys of the section and reaches the constructor as it is. With `_partial_: true` the constructor is not
    called but returned with its arguments bound. None stays None.

    Raises:
        InputError: if target and arguments do not fit; it names the key.
        Exception: what a constructor raises, unchanged.
    """
    if isinstance(node, dict | list):
        node = OmegaConf.create(node)
    if node is None or (OmegaConf.is_config(node) and node._is_none()):
        return None
    if not OmegaConf.is_config(node) or (given and "_target_" not in node):
        raise InputError(
            f"{str(node)!r} stands where the configuration describes an object",
            expected="a section with _target_",
            do="override the keys of the section, not the section",
        )
    check_calls(node, given)
    if "_target_" not in node:
        return instantiate_node(node)
    rest = copy.deepcopy(node)  # keeps its place in the configuration, so that references still resolve
    OmegaConf.set_struct(rest, False)
    for name in given:
        rest.pop(name, None)
    is_partial = bool(rest.pop("_partial_", False))
    # Called here and not by Hydra, which would turn given dataclasses, lists and dicts into configuration.
    constructor = instantiate_node(rest, _partial_=True)
    if is_partial:
        return functools.partial(constructor, **given)
    try:
        return constructor(**given)
    except ModuleNotFoundError as error:
        raise missing_package_error(error) from None
    except Exception as error:
        explained = explain_foreign_error(error, str(node._target_), node._get_full_key(""))
        if explained is None:
            raise
        raise explained from error


def build_each(nodes: Any, available: dict[str, Any]) -> list[Any]:
    """Build callbacks or loggers by name; `needs` of a node maps an argument to a name in `available`."""
    built = []
    for node in (nodes or {}).values():
        node = copy.deepcopy(node)  # keeps its place in the configuration, so that references still resolve
        OmegaConf.set_struct(node, False)
        needs = node.pop("needs", {})
        built.append(build(node, **{argument: available[name] for argument, name in needs.items()}))
    return built


def explain_foreign_error(error: BaseException, target: str, section: str) -> InputError | None:
    """Return what a user can do where a target of FOREIGN_PACKAGES refuses its arguments; None for other errors.

    Its signature does not tell which arguments it takes together. A constructor of this package, or of the user's own,
    says itself what is wrong.
    """
    if not isinstance(error, Exception) or isinstance(error, InputError):
        return None
    if target.partition(".")[0] not in FOREIGN_PACKAGES:
        return None
    section, reason = section or "that describes it", " ".join(str(error).split())
    return InputError(
        f"{target} refuses the section {section}: {reason or type(error).__name__}",
        expected="values that it takes",
        do=f"change the keys of {section}, or those that they refer to",
    )


def instantiate_node(node: Any, **options: Any) -> Any:
    """Call Hydra's `instantiate` and raise what a constructor raised as it was."""
    try:
        return instantiate(node, _convert_="all", **options)
    except InstantiationException as error:
        cause = error.__cause__ or InputError(
            " ".join(str(error).split()),
            expected="a callable that may be built from a configuration",
            do="choose another _target_",
        )
        named = re.search(r"target '([^']+)'[\s\S]*full_key: (\S+)$", str(error))
    if isinstance(cause, ModuleNotFoundError):
        raise missing_package_error(cause) from None
    raise (explain_foreign_error(cause, *named.groups()) if named else None) or cause
