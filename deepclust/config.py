"""Between Hydra and the rest: objects out of a configuration, and in one line what is wrong with it.

All of Hydra's `instantiate` goes through `build`: later releases want trusted targets named at each call.
"""

import copy
import difflib
import functools
import importlib
import inspect
import os
import pkgutil
import re
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)
from yaml import YAMLError

from deepclust.errors import InputError

CONFIGS = "deepclust.conf"
VERSION_BASE = "1.3"  # whose behaviour of Hydra the configurations are written for
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError)
_NOT_ARGUMENTS = {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}
_SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}

_LEAST = {"batch_size": 1, "clean_batch_size": 1, "trainer.max_epochs": 0, "seed": -(2**63)}  # of whole numbers

# ${last_part:PATH}: the name of a file or folder, without those above it.
OmegaConf.register_new_resolver("last_part", lambda path: Path(os.path.abspath(path)).name, replace=True)


def nearest(word: str, known: Collection[str]) -> str | None:
    """The name that was most likely meant: one that ends in `.word`, else the one spelt most alike."""
    ends = sorted((name for name in known if name.endswith(f".{word}")), key=len)
    close = ends or difflib.get_close_matches(word, sorted(known), n=1)
    return close[0] if close else None


# Values


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries and lists, interpolations resolved.

    Raises:
        InputError: naming the keys that have no value yet, or the interpolation that leads nowhere.
    """
    unset = [key for key, value in _entries(OmegaConf.to_container(cfg), cfg._get_full_key("")) if value == "???"]
    if unset:
        raise _has_no_value(*unset)
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explain_value(error) from error
    return values


def check_numbers(values: dict[str, Any]) -> None:
    """Hold the numbers that no constructor checks against what they may be; those of earlier stages too.

    Raises:
        InputError: naming the key, where one is no whole number or too small or large.
    """
    for key, value in _entries(values):
        least = _LEAST.get(re.sub(r"^((before|network)\.)+", "", key))
        if least is None or (value is None and key.startswith("network.")):  # there it is worked out
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            limits = "between -2^63 and 2^63" if least < 0 else f"{least} or more"
            raise InputError(
                f"{key} is {value!r}", expected=f"a whole number, {limits}", do=f"set {key} to such a number"
            )


def _has_no_value(*keys: str) -> InputError:
    return InputError(
        f"{' and '.join(keys)} {'has' if len(keys) == 1 else 'have'} no value",
        expected="one for every key that the configuration leaves open (???)",
        do=f"add {' '.join(f'{key}=VALUE' for key in keys)}",
    )


def load_run_config(run: Path) -> DictConfig:
    """The composed configuration that a run folder keeps; interpolations are not resolved.

    Raises:
        InputError: where `run` is no run folder.
    """
    path = run / ".hydra" / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"{run} {'holds no .hydra/config.yaml' if run.is_dir() else 'is no folder'}",
            expected="a folder that deepclust train has written",
            do="name one, for example run=outputs/DATE/TIME",
        )
    cfg = OmegaConf.load(path)
    assert isinstance(cfg, DictConfig)  # Hydra writes nothing else
    return cfg


def _entries(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key below `node`, sections too, with its value."""
    if isinstance(node, dict | list):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            key = f"{prefix}.{name}" if prefix else str(name)
            yield key, child
            yield from _entries(child, key)


def _keys(cfg: Any) -> list[str]:
    return [key for key, _ in _entries(OmegaConf.to_container(cfg))]


# Objects


def build(node: Any, **given: Any) -> Any:
    """What a section of the configuration describes: the object of its `_target_`, or a list or dict of such.

    Nested sections are built first; lists and mappings reach the constructors as plain `list` and `dict`.
    `given` replaces keys of the section and reaches the constructor as it is. With `_partial_: true` the
    constructor is not called but returned with its arguments bound. None stays None.

    Raises:
        InputError: naming the key, where target and arguments do not fit.
        Exception: what a constructor raises, as it is.
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
    _check(node, given)
    if "_target_" not in node:
        return _instantiate(node)
    rest = copy.deepcopy(node)  # knows its place, so that interpolations still resolve
    OmegaConf.set_struct(rest, False)
    for name in given:
        rest.pop(name, None)
    deferred = bool(rest.pop("_partial_", False))
    # Called here and not by Hydra, which would make configuration of given dataclasses, lists and dicts.
    target = _instantiate(rest, _partial_=True)
    if deferred:
        return functools.partial(target, **given)
    try:
        return target(**given)
    except ModuleNotFoundError as error:
        raise _lacks_package(error) from None


def _instantiate(node: Any, **how: Any) -> Any:
    try:
        return instantiate(node, _convert_="all", **how)
    except InstantiationException as error:
        cause = error.__cause__ or InputError(
            str(error).partition("\n")[0],
            expected="a callable that may be built from a configuration",
            do="choose another _target_",
        )
    if isinstance(cause, ModuleNotFoundError):
        raise _lacks_package(cause) from None
    raise cause


def _lacks_package(error: ModuleNotFoundError) -> Exception:
    if (error.name or "").startswith("deepclust"):
        return error
    package = error.name.partition(".")[0] if error.name else "it"
    return InputError(
        f"a package is missing: {_first_line(error)}",
        expected="the optional packages of what the configuration chooses",
        do=f"install {package}, alone or by an extra of deepclust (see README), or choose another option",
    )


def _check(node: Any, given: Collection[str] = ()) -> None:
    """Hold every call that `node` describes against the signature of its target."""
    if isinstance(node, ListConfig):
        names: list[Any] = list(range(len(node)))
    elif isinstance(node, DictConfig):
        names = [name for name in node if name not in given]
    else:
        return
    for name in names:
        if OmegaConf.is_missing(node, name):
            raise _has_no_value(node._get_full_key(name))
    if "_target_" in node and isinstance(node, DictConfig):
        _check_call(node, given)
        if not node.get("_recursive_", True):
            return
    for name in names:
        _check(node[name])


def _check_call(node: DictConfig, given: Collection[str]) -> None:
    target = _locate(str(node._target_), node._get_full_key("_target_"))
    signature = _signature(target)
    if signature is None:
        return
    called = getattr(target, "__qualname__", node._target_)
    parameters = list(signature.parameters.values())
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    named = [str(name) for name in node if name not in _NOT_ARGUMENTS and name not in given]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in named:
            if name not in by_name:
                free = sorted(by_name.keys() - set(named) - set(given))
                meant = nearest(name, free)
                raise InputError(
                    f"{node._get_full_key(name)} is no argument of {called}",
                    expected=meant or f"one of {', '.join(free)}",
                    do=f"write {node._get_full_key(meant)}" if meant else "rename or remove it",
                )
    if not node.get("_partial_", False):
        by_position = len(node.get("_args_", ()))
        for name, p in list(by_name.items())[by_position:]:
            if p.default is p.empty and name not in named and name not in given:
                raise InputError(
                    f"{called} lacks its argument {name}",
                    expected="a value for every argument without a default",
                    do=f"add {node._get_full_key(name)}",
                )
    for name in named:
        if name in by_name:
            _check_value(_source(node, name), node[name], by_name[name])


def _source(node: Any, name: str) -> str:
    """The key to change for another value of `name`: where its reference leads, or its own."""
    reference = re.fullmatch(r"\$\{([A-Za-z_][\w.]*)\}", str(dict(_entries(OmegaConf.to_container(node)))[name]))
    if reference is None:
        return node._get_full_key(name)
    section, _, last = reference[1].rpartition(".")
    return _source(OmegaConf.select(node._get_root(), section) if section else node._get_root(), last)


def _check_value(key: str, value: Any, parameter: inspect.Parameter) -> None:
    """Refuse a number, text or null that the annotation rules out; other values and annotations pass."""
    if not isinstance(value, tuple(_SCALARS)) or value is parameter.default:
        return
    accepted = []
    for kind in _alternatives(parameter.annotation):
        if kind in _SCALARS:
            whole_is_enough = kind in (int, float) and isinstance(value, int)
            fits, words = isinstance(value, kind) or whole_is_enough, _SCALARS[kind]
        elif typing.get_origin(kind) is Literal:
            options = typing.get_args(kind)
            fits, words = value in options, " or ".join(str(option) for option in options)
        elif (typing.get_origin(kind) or kind) is Callable:
            fits, words = False, "a section with _target_"
        else:
            return
        if fits:
            return
        accepted.append(words)
    raise InputError(f"{key} is {value!r}", expected=" or ".join(accepted), do=f"set {key} to that")


def _alternatives(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for member in typing.get_args(annotation) for kind in _alternatives(member)]
    return [annotation]


def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(target, eval_str=True)
    except Exception:  # annotations may hold any expression, and names that only type checkers see
        pass
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):  # not callable (Hydra says so), or written in C
        return None


def _locate(path: str, key: str) -> Any:
    parts = path.split(".")
    found: Any = None
    for i, part in enumerate(parts):
        try:
            found = getattr(found, part) if i else importlib.import_module(part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[: i + 1]))
            except ModuleNotFoundError as error:
                if not error.name or not path.startswith(error.name):
                    raise _lacks_package(error) from None
                known = [*dir(found), *(m.name for m in pkgutil.iter_modules(getattr(found, "__path__", [])))]
                meant = nearest(part, known)
                raise InputError(
                    f"{key} is {path} and {'.'.join(parts[:i])} has no {part}",
                    expected="the dotted path of a class or function",
                    do=f"write {'.'.join([*parts[:i], meant, *parts[i + 1 :]])}" if meant else "correct it",
                ) from error
        except ModuleNotFoundError as error:
            if error.name != part:
                raise _lacks_package(error) from None
            raise InputError(
                f"{key} is {path} and there is no module {part}",
                expected="the dotted path of a class or function",
                do=f"install {part}, or put its folder on PYTHONPATH",
            ) from error
    return found


# Errors of Hydra and OmegaConf


def explain_value(error: OmegaConfBaseException) -> InputError:
    """What a user can do about a value that cannot be had."""
    key = error.full_key or "the configuration"
    if isinstance(error, InterpolationKeyError):
        name = _named_in(error)
        meant = nearest(name, _keys(error.parent_node._get_root()))
        return InputError(
            f"{key} refers to {name}, which does not exist",
            expected=meant or "the name of a key",
            do=f"write ${{{meant}}}" if meant else f"give {key} a value, or correct the reference",
        )
    if isinstance(error, InterpolationResolutionError):
        line = _first_line(error)
        return InputError(
            f"{key} cannot be resolved: {line.partition('while resolving interpolation: ')[2] or line}",
            expected="a reference to a value",
            do=f"give {key} a value, or correct what it refers to",
        )
    return InputError(f"{key}: {_first_line(error)}", expected="another value", do=f"change {key}")


def explain(
    error: Exception, *, command: str, config_name: str, config_dir: str | None, overrides: Sequence[str]
) -> InputError:
    """What a user of `command` can do about an error of Hydra's own, outside the jobs."""
    if isinstance(error, OverrideParseException):
        return InputError(
            f"cannot read {error.override!r}",
            expected="KEY=VALUE, GROUP=OPTION, +KEY=VALUE or ~KEY",
            do="quote special characters twice, as in 'KEY=\"a, b\"'",
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = error.options or []
        meant = nearest(option, options)
        what = f"the group {group} has no option {option!r}" if group else f"there is no configuration {option!r}"
        expected = f"one of {', '.join(options)}" if options else "the name of a YAML file without its ending"
        do = f"write {group}={meant}" if meant else "choose another, or name your own folder with --config-dir"
        return InputError(what, expected=expected, do=do)
    if isinstance(error, OmegaConfBaseException):
        return explain_value(error)
    if isinstance(error, YAMLError):
        return InputError(" ".join(str(error).split()), expected="valid YAML", do="correct the file")

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    unknown = _named_in(error) if str(error).startswith("Could not delete") else None
    if isinstance(error.__cause__, ConfigKeyError | ConfigAttributeError):
        unknown = str(error.__cause__.full_key)
    for override in parsed:
        if unknown is not None and f"{override.key_or_group}.".startswith(f"{unknown}."):
            others = [str(o.input_line) for o in parsed if o is not override and not o.is_sweep_override()]
            groups, keys = known_keys(config_name, config_dir, others)
            for swept in parsed:
                if swept.is_sweep_override() and swept.key_or_group in groups and swept is not override:
                    choices = [f"{swept.key_or_group}={option}" for option in swept.sweep_string_iterator()]
                    lack = [c for c in choices if unknown not in known_keys(config_name, config_dir, [*others, c])[1]]
                    if lack and (len(lack) < len(choices) or unknown in keys):  # keys: those of the default option
                        return InputError(
                            f"{' and '.join(lack)} {'has' if len(lack) == 1 else 'have'} no key {unknown}",
                            expected="a key that every job of the sweep has",
                            do=f"leave {override.input_line} out"
                            + (f", or sweep without {' and '.join(lack)}" if len(lack) < len(choices) else ""),
                        )
            return _unknown_key(override, command, [*groups, *keys])
    if isinstance(error.__cause__, OmegaConfBaseException):
        return explain_value(error.__cause__)
    if str(error).startswith(("Ambiguous value", "Sweep parameters")):
        key, _, values = next(str(o.input_line) for o in parsed if o.is_sweep_override()).partition("=")
        return InputError(
            f"{key} has several values",
            expected="one value, or -m to run one job for each",
            do=f"add -m, or write {key}=[{values}] for a list",
        )
    if str(error).startswith("Config group override must be"):
        groups, _ = known_keys(config_name, config_dir, [])
        for override in parsed:
            if override.key_or_group in groups and not isinstance(override.value(), str | list):
                return InputError(
                    f"{override.input_line} does not name an option",
                    expected=f"an option of the group {override.key_or_group}",
                    do=f"see {command} --help, or write ~{override.key_or_group} to leave the group out",
                )
    if "No match in the defaults list" in str(error):
        what = f"{command} has no group {_named_in(error)}"
        return InputError(what, expected="one of its own groups", do=f"see {command} --help")
    system = error if isinstance(error, OSError) else error.__cause__  # which logging wraps
    if isinstance(system, OSError) and system.strerror:
        what = f"{system.strerror}: {system.filename}" if system.filename else system.strerror
        return InputError(what, expected="a place to write to", do="choose one with hydra.run.dir=DIR")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, *more = lines or [type(error).__name__]
    if first.endswith(":") and more:
        first = f"{first} {more.pop(0)}"
    return InputError(
        first.rstrip("."),
        expected="a configuration that can be composed",
        do=more[0] if more else f"see {command} --help",
    )


def _unknown_key(override: Override, command: str, known: Collection[str]) -> InputError:
    line, key = str(override.input_line), override.key_or_group
    section, _, name = key.rpartition(".")
    if section == "trainer" and not override.is_delete() and name in _trainer_arguments():
        return InputError(
            f"there is no key {key}",
            expected="a key that is there, or + before another argument of lightning.Trainer",
            do=f"write +{line}",
        )
    within_hydra = [name for name in known if name.startswith("hydra") == key.startswith("hydra")]
    meant = nearest(key, within_hydra)
    return InputError(
        f"there is no key or group {key}",
        expected=meant or f"one that {command} --cfg job shows",
        do=f"write {line.replace(key, meant, 1)}" if meant else f"leave {line} out",
    )


def _trainer_arguments() -> Collection[str]:
    from lightning import Trainer  # takes seconds, which only such a mistake costs

    return inspect.signature(Trainer).parameters


def known_keys(config_name: str, config_dir: str | None, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The groups and the dotted keys that could be overridden, as far as the configuration composes."""
    searchpath = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    for kept in (overrides, []):
        try:
            with (
                warnings.catch_warnings(action="ignore"),
                initialize_config_module(CONFIGS, version_base=VERSION_BASE),
            ):
                cfg = compose(config_name, overrides=[*kept, *searchpath], return_hydra_config=True)
                groups = GlobalHydra.instance().config_loader().list_groups("")
        except COMPOSITION_ERRORS:
            continue
        return groups, _keys(cfg)
    return [], []


def _named_in(error: Exception) -> str:
    """What stands in quotes in Hydra's text."""
    return str(error).partition("'")[2].partition("'")[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
