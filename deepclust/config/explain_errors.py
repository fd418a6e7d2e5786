"""What a user can do about the errors of Hydra and OmegaConf: one short function for each kind of error.

Hydra's errors say in several lines what went wrong, and seldom what to do. `explain_composition_error` asks each
matcher in turn; the first that knows the error turns it into an `InputError`.
"""

import sys
from dataclasses import dataclass
from functools import cached_property

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from deepclust.config.composition import list_groups_and_keys, list_options
from deepclust.config.keys import list_settable_keys
from deepclust.config.missing_values import explain_value_error, quoted_name
from deepclust.config.suggestions import find_nearest_name, suggest_known_key
from deepclust.errors import InputError

# Sweeps that list their values. An interval(...) of a sweeper that searches names no options, glob(...) existing ones.
LISTS = (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP, ValueType.RANGE_SWEEP)


@dataclass(frozen=True)
class Composition:
    """What was being composed when the error came: the command, the root configuration and the overrides."""

    command: str
    config_name: str
    config_dir: str | None
    overrides: list[str]

    @cached_property
    def parsed_overrides(self) -> list[Override]:
        """The overrides as Hydra understands them."""
        return OverridesParser.create().parse_overrides(self.overrides)

    def list_groups_and_keys(self, overrides: list[str]) -> tuple[list[str], list[str]]:
        """List the groups and dotted keys that there are with these overrides."""
        return list_groups_and_keys(self.config_name, self.config_dir, overrides)

    def list_settable(self, overrides: list[str]) -> list[str]:
        """List the dotted keys that can be given a value, with these overrides."""
        return list_groups_and_keys(self.config_name, self.config_dir, overrides, list_keys=list_settable_keys)[1]


def explain_composition_error(
    error: Exception, *, command: str, config_name: str, config_dir: str | None, overrides: list[str]
) -> InputError:
    """Return what a user of `command` can do about an error of Hydra's own, outside the jobs."""
    composition = Composition(command, config_name, config_dir, list(overrides))
    for explain in MATCHERS:
        if (explained := explain(error, composition)) is not None:
            return explained
    return explain_by_its_text(error, composition)


def check_chosen_options(*, command: str, config_name: str, config_dir: str | None, overrides: list[str]) -> None:
    """Refuse options of groups that Hydra passes over, or that make it fail with an error of the program.

    Raises:
        InputError: for a recipe that does not exist, which Hydra takes for an optional one, and for an option that is
            no name, such as `views=[1,[2]]`.
    """
    composition = Composition(command, config_name, config_dir, list(overrides))
    try:
        parsed = composition.parsed_overrides
    except OverrideParseException:  # Hydra says so
        return
    for override in parsed:
        if override.is_delete() or (override.is_sweep_override() and override.value_type not in LISTS):
            continue
        key = override.key_or_group
        chosen = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
        names = [name for choice in chosen for name in (choice if isinstance(choice, list) else [choice])]
        if isinstance(chosen[0], list) and not all(isinstance(name, str) for name in names):
            if key in composition.list_groups_and_keys([])[0]:
                raise InputError(
                    f"{override.input_line} does not name options",
                    expected=f"an option of the group {key}, or a list of such",
                    do=f"see {command} --help",
                )
        elif key == "recipe":
            options = list_options(key, config_name, config_dir, composition.overrides)
            for name in names:
                if isinstance(name, str) and options and name not in options:
                    nearest = find_nearest_name(name, options)
                    raise InputError(
                        f"the group {key} has no option {name!r}",
                        expected=f"one of {', '.join(options)}",
                        do=f"write {key}={nearest}" if nearest else f"leave {key} out",
                    )


# Matchers: (error, composition) -> InputError, or None for an error of another kind --------------------------------


def explain_unreadable_override(error: Exception, composition: Composition) -> InputError | None:
    """An override that Hydra's grammar does not know, such as `seed=[1`."""
    if not isinstance(error, OverrideParseException):
        return None
    return InputError(
        f"cannot read {error.override!r}",
        expected="KEY=VALUE, GROUP=OPTION, +KEY=VALUE or ~KEY",
        do="quote special characters twice, as in 'KEY=\"a, b\"'",
    )


def explain_missing_option(error: Exception, composition: Composition) -> InputError | None:
    """An option that its group does not have, such as `method=propso`, or another root configuration."""
    if not (isinstance(error, MissingConfigException) and error.missing_cfg_file):
        return None
    group, _, option = error.missing_cfg_file.rpartition("/")
    options = error.options or []
    nearest = find_nearest_name(option, options)
    what = f"the group {group} has no option {option!r}" if group else f"there is no configuration {option!r}"
    expected = f"one of {', '.join(options)}" if options else "the name of a YAML file without its ending"
    do = f"write {group}={nearest}" if nearest else "choose another, or name your own folder with --config-dir"
    return InputError(what, expected=expected, do=do)


def explain_value_outside_jobs(error: Exception, composition: Composition) -> InputError | None:
    """A value that cannot be resolved or converted while the configuration is composed."""
    return explain_value_error(error) if isinstance(error, OmegaConfBaseException) else None


def explain_invalid_yaml(error: Exception, composition: Composition) -> InputError | None:
    """A YAML file of the user's that cannot be parsed."""
    if not isinstance(error, YAMLError):
        return None
    return InputError(" ".join(str(error).split()), expected="valid YAML", do="correct the file")


def explain_unknown_key(error: Exception, composition: Composition) -> InputError | None:
    """A key that does not exist, such as `trainer.max_epoch=3`; in a sweep, a key that some options do not have."""
    unknown = quoted_name(error) if str(error).startswith("Could not delete") else None
    if isinstance(error.__cause__, ConfigKeyError | ConfigAttributeError):
        unknown = str(error.__cause__.full_key)
    if unknown is None:
        return None
    for override in composition.parsed_overrides:
        if f"{override.key_or_group}.".startswith(f"{unknown}."):
            others = [
                str(other.input_line)
                for other in composition.parsed_overrides
                if other is not override and not other.is_sweep_override()
            ]
            groups, keys = composition.list_groups_and_keys(others)
            return explain_key_of_some_options(
                unknown, override, others, groups, keys, composition
            ) or suggest_known_key(
                override,
                composition.command,
                groups,
                keys if override.is_delete() else composition.list_settable(others),
            )
    return None


def explain_key_of_some_options(
    unknown: str,
    override: Override,
    others: list[str],
    groups: list[str],
    keys: list[str],
    composition: Composition,
) -> InputError | None:
    """A sweep over options of which some lack the key, such as `-m method=cc,kmeans method.temperature=1`.

    `keys` are those of the group's default option; `others` are the overrides without sweeps.
    """
    for swept in composition.parsed_overrides:
        if swept.is_sweep_override() and swept.key_or_group in groups and swept is not override:
            choices = [f"{swept.key_or_group}={option}" for option in swept.sweep_string_iterator()]
            lacking = [c for c in choices if unknown not in composition.list_groups_and_keys([*others, c])[1]]
            if lacking and (len(lacking) < len(choices) or unknown in keys):
                without = f", or sweep without {' and '.join(lacking)}" if len(lacking) < len(choices) else ""
                return InputError(
                    f"{' and '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} no key {unknown}",
                    expected="a key that every job of the sweep has",
                    do=f"leave {override.input_line} out{without}",
                )
    return None


def explain_value_while_composing(error: Exception, composition: Composition) -> InputError | None:
    """A value whose error Hydra wraps in one of its own."""
    cause = error.__cause__
    return explain_value_error(cause) if isinstance(cause, OmegaConfBaseException) else None


def explain_several_values(error: Exception, composition: Composition) -> InputError | None:
    """Several values for a key without -m, such as `seed=1,2`."""
    if not str(error).startswith(("Ambiguous value", "Sweep parameters")):
        return None
    swept = next(override for override in composition.parsed_overrides if override.is_sweep_override())
    key, _, values = str(swept.input_line).partition("=")
    return InputError(
        f"{key} has several values",
        expected="one value, or -m to run one job for each",
        do=f"add -m, or write {key}=[{values}] for a list",
    )


def explain_group_without_option(error: Exception, composition: Composition) -> InputError | None:
    """A group whose value is not the name of an option, such as `experiment=null`."""
    if not str(error).startswith("Config group override must be"):
        return None
    groups, _ = composition.list_groups_and_keys([])
    for override in composition.parsed_overrides:
        if override.key_or_group in groups and not isinstance(override.value(), str | list):
            return InputError(
                f"{override.input_line} does not name an option",
                expected=f"an option of the group {override.key_or_group}",
                do=f"see {composition.command} --help, or write ~{override.key_or_group} to leave the group out",
            )
    return None


def explain_unknown_group(error: Exception, composition: Composition) -> InputError | None:
    """A group that the root configuration does not have."""
    if "No match in the defaults list" not in str(error):
        return None
    return InputError(
        f"{composition.command} has no group {quoted_name(error)}",
        expected="one of its own groups",
        do=f"see {composition.command} --help",
    )


def explain_run_folder(error: Exception, composition: Composition) -> InputError | None:
    """A run folder that cannot be made or written."""
    # Where the log cannot be written, logging wraps the system's error.
    system_error = error if isinstance(error, OSError) else error.__cause__
    if not (isinstance(system_error, OSError) and system_error.strerror):
        return None
    place = f": {system_error.filename}" if system_error.filename else ""
    mode = "sweep" if {"-m", "--multirun"} & {*sys.argv} else "run"
    return InputError(
        f"{system_error.strerror}{place}", expected="a place to write to", do=f"choose one with hydra.{mode}.dir=DIR"
    )


def explain_by_its_text(error: Exception, composition: Composition) -> InputError:
    """Any other error: its first line, with the second as what to do."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, *more = lines or [type(error).__name__]
    if first.endswith(":") and more:
        first = f"{first} {more.pop(0)}"
    return InputError(
        first.rstrip("."),
        expected="a configuration that can be composed",
        do=more[0] if more else f"see {composition.command} --help",
    )


MATCHERS = (
    explain_unreadable_override,
    explain_missing_option,
    explain_value_outside_jobs,
    explain_invalid_yaml,
    explain_unknown_key,
    explain_value_while_composing,
    explain_several_values,
    explain_group_without_option,
    explain_unknown_group,
    explain_run_folder,
)
