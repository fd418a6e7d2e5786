"""A method or a network of a Python program as a part of a configuration: by its dotted path, or handed over."""

import functools
import importlib
import importlib.resources
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from torch import nn

from deepclust.config.composition import CONFIG_PACKAGE
from deepclust.config.handed_over import PREFIX
from deepclust.config.override_format import format_value
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.runs.checkpoint import compute_checksum

OWN = "own"  # the options of conf/own, which hold what has no file of its own


@dataclass(frozen=True)
class ChosenPart:
    """The overrides that choose a method or a backbone, and the object itself where no path leads to it."""

    overrides: list[str] = field(default_factory=list)
    handed_over: Any = None
    is_own: bool = False  # whether conf/own is needed


def choose_method(method: Any, arguments: Mapping[str, Any] | None) -> ChosenPart:
    """Return what chooses a method: the name of an option, or a class; `arguments` are those of its constructor.

    A class that extends a method of deepclust starts from the configuration of that.

    Raises:
        InputError: if it is neither.
    """
    given = [f"++method.{name}={format_value(value)}" for name, value in (arguments or {}).items()]
    if isinstance(method, str):
        return ChosenPart([f"method={method}", *given])
    if not (isinstance(method, type) and issubclass(method, ClusteringMethod)):
        raise InputError(
            f"method is {describe(method)}",
            expected="the name of a method, or a subclass of deepclust.methods.base.ClusteringMethod",
            do="write method='propos', or hand over the class itself and its arguments in method_arguments",
        )
    targets = read_method_targets()
    base = next((kind for kind in method.__mro__ if kind in targets), None)
    if base is method:
        return ChosenPart([f"method={targets[method]}", *given])
    path = find_import_path(method)
    overrides = [f"method={targets[base] if base else OWN}", f"++method._target_={path or f'{PREFIX}method'}"]
    overrides.append(f"names.method={method.__name__}")
    if base is None:
        overrides += adapt_to_signature(method)
    return ChosenPart([*overrides, *given], None if path else method, is_own=base is None)


def read_method_targets() -> dict[type, str]:
    """Return the classes that the options of conf/method build, with the option: that of the module's name, if any."""
    options: dict[type, str] = {}
    for file in sorted(importlib.resources.files(CONFIG_PACKAGE).joinpath("method").iterdir(), key=lambda f: f.name):
        name = file.name.removesuffix(".yaml")
        target = yaml.safe_load(file.read_text(encoding="utf-8"))["method"].get("_target_")
        if target is None:  # a special case of another method
            continue
        module, _, attribute = target.rpartition(".")
        kind = getattr(importlib.import_module(module), attribute)
        if kind not in options or module.rpartition(".")[2] == name:
            options[kind] = name
    return options


def adapt_to_signature(method: type) -> list[str]:
    """Return the overrides that give a class the arguments of conf/own/method/own.yaml that it takes, and no others."""
    parameters = inspect.signature(method).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    overrides = []
    if not takes_any:
        given = ("backbone", "num_clusters", "optimizer", "schedule")
        overrides += [f"~method.{name}" for name in given if name not in parameters]
    if takes_any or is_required(parameters, "e_step_every_n_epochs"):
        overrides.append("++method.e_step_every_n_epochs=0")
    if is_required(parameters, "num_images"):
        overrides.append("++method.num_images=${dataset.num_images}")
    return overrides


def is_required(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    """Return whether there is such a parameter, without a default."""
    return name in parameters and parameters[name].default is inspect.Parameter.empty


def choose_backbone(backbone: Any) -> ChosenPart:
    """Return what chooses a backbone: the name of an option, a network, or what makes one; None leaves the choice open.

    Raises:
        InputError: if it is something else.
    """
    if backbone is None:
        return ChosenPart()
    if isinstance(backbone, str):
        return ChosenPart([f"backbone={backbone}"])
    name, path, record = describe(backbone), None, []
    arguments: dict[str, Any] = {}
    if isinstance(backbone, nn.Module):
        record = [f"++backbone.sha256={compute_checksum(backbone.state_dict())}"]
    elif callable(backbone):
        maker: Callable[..., Any] = backbone
        if isinstance(backbone, functools.partial) and not backbone.args:
            maker, arguments = backbone.func, dict(backbone.keywords)
        path = find_import_path(maker) if all(map(is_plain, arguments.values())) else None
        name = describe(maker)
    else:
        raise InputError(
            f"backbone is {name}",
            expected="the name of a backbone, a torch.nn.Module, or a class or function that makes one",
            do="write backbone='resnet18', or hand over the network",
        )
    if path is None:
        record.append(f"++backbone.name={format_value(name)}")
        arguments = {}
    overrides = [f"backbone={OWN}", f"++backbone.network._target_={path or f'{PREFIX}backbone'}"]
    overrides += [f"++backbone.network.{key}={format_value(value)}" for key, value in arguments.items()]
    overrides += [*record, f"names.backbone={name.rpartition('.')[2]}"]
    return ChosenPart(overrides, None if path else backbone, is_own=True)


def find_import_path(thing: Any) -> str | None:
    """Return the dotted path by which any process can import a class or function; None if there is none.

    What a notebook or script defines (`__main__`), or a function within itself, has none.
    """
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not module or not name or module == "__main__" or "<" in name:
        return None
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return f"{module}.{name}" if found is thing else None


def is_plain(value: Any) -> bool:
    """Return whether a configuration can hold a value."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(child) for key, child in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def describe(thing: Any) -> str:
    """Return the name of a class or function, or of the class of an object."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}".replace("<locals>.", "").replace("<lambda>", "lambda")
