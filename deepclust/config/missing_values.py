"""Errors of values: keys without one, and values that cannot be resolved or converted."""

from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from deepclust.config.keys import list_keys
from deepclust.config.suggestions import find_nearest_name
from deepclust.errors import InputError


def missing_value_error(*keys: str) -> InputError:
    """Return the error for keys that the configuration leaves open (???)."""
    return InputError(
        f"{' and '.join(keys)} {'has' if len(keys) == 1 else 'have'} no value",
        expected="one for every key without a default (--help says what it may be)",
        do=f"add {' '.join(f'{key}=VALUE' for key in keys)}",
    )


def explain_value_error(error: OmegaConfBaseException) -> InputError:
    """Return what a user can do about a value that cannot be had."""
    key = error.full_key or "the configuration"
    if isinstance(error, InterpolationKeyError):
        name = quoted_name(error)
        nearest = find_nearest_name(name, list_keys(error.parent_node._get_root()))
        return InputError(
            f"{key} refers to {name}, which does not exist",
            expected=nearest or "the name of a key",
            do=f"write ${{{nearest}}}" if nearest else f"give {key} a value, or correct the reference",
        )
    if isinstance(error, InterpolationResolutionError):
        line = first_line(error)
        reference = "" if error.child_node is None else f" {error.child_node._value()}"
        return InputError(
            f"{key}{reference} cannot be resolved: {line.partition('while resolving interpolation: ')[2] or line}",
            expected="a reference to a value",
            do=f"give {key} a value, or correct what it refers to",
        )
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return InputError(
            f"{key} is missing", expected="the key in the configuration", do=f"leave ~{key} out, or write +{key}=VALUE"
        )
    return InputError(f"{key}: {first_line(error)}", expected="another value", do=f"change {key}")


def quoted_name(error: Exception) -> str:
    """Return what stands in quotes in Hydra's text."""
    return str(error).partition("'")[2].partition("'")[0]


def first_line(error: BaseException) -> str:
    """Return the first line of an error, or its type where it has no text."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
