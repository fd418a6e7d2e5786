"""The arguments of a verb: paths as they are typed, Hydra's flags, and flags that cannot be used."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from typing import Any

from deepclust.config.override_format import is_plain_text, quote
from deepclust.errors import InputError

PATH_KEYS = {
    *("images", "run", "runs", "sweep", "output", "sort_to", "start", "data_dir", "dataset.path", "dataset.root"),
    *("backbone.weights", "hydra.run.dir", "hydra.sweep.dir"),
}  # keys whose values are taken as they are typed


# Keys of these for which null stands for none, by verb ("": all verbs); for the others it is the name of a folder.
NULL_MEANS_NONE = {
    "": {"dataset.root", "backbone.weights"},
    "train": {"start"},
    "cluster": {"data_dir", "sort_to"},
    "evaluate": {"data_dir"},
    "predict": {"sort_to"},
    "features": {"run", "output"},
    "compare": {"output"},
}


def quote_path(argument: str, *, is_sweep: bool, verb: str = "train") -> str:
    """Quote the value of KEY=PATH so that Hydra's grammar takes it as one text: a folder may be named 2024 or true.

    The packages of `trust` are one text, too. What is not a path, or says more than one (a list, a reference), stays as
    it is; the values of a sweep are quoted one by one where they need no quotes but these.
    """
    key, _, value = argument.partition("=")
    name = key.lstrip("+")
    if verb == "cluster" and name == "num_clusters" and not is_sweep and re.fullmatch(r"\d+(,\d+)+", value):
        return f"{key}=[{value}]"  # several numbers are one job here, which computes the features once
    means_none = value.lower() == "null" and name in NULL_MEANS_NONE[""] | NULL_MEANS_NONE.get(verb, set())
    is_expression = value.startswith(("'", '"', "[")) or "${" in value
    if name not in {*PATH_KEYS, "trust"} or is_expression or means_none:
        return argument
    if is_sweep and "," in value:
        values = value.split(",")
        return f"{key}={','.join(map(quote_text, values))}" if all(map(is_simple_path, values)) else argument
    return f"{key}={quote_text(value)}"


def quote_text(value: str) -> str:
    """Return a text as Hydra's grammar takes it for this text, in quotes where it needs them."""
    if not value or (is_simple_path(value) and is_plain_text(value)):
        return value
    return quote(value, "'")


def is_simple_path(value: str) -> bool:
    """Return whether a path is made up of characters that mean nothing special to Hydra's grammar."""
    return re.fullmatch(r"[A-Za-z0-9_/.-]*", value) is not None


def name_plain_arguments(arguments: list[str]) -> list[str]:
    """Return the arguments of `deepclust sweep` as overrides: --json is json=true, and the one plain word sweep=DIR.

    A folder that is there is such a word, too: folders named by their values have a `=` in their names.
    """
    arguments = ["json=true" if argument == "--json" else argument for argument in arguments]
    given = parse_arguments("sweep", arguments).overrides
    plain = [word for word in given if ("=" not in word and not word.startswith("~")) or Path(word).is_dir()]
    if len(plain) != 1 or any(word.startswith("sweep=") for word in given):
        return arguments
    position = len(arguments) - 1 - arguments[::-1].index(plain[0])
    return [*arguments[:position], f"sweep={plain[0]}", *arguments[position + 1 :]]


def parse_arguments(verb: str, arguments: list[str]) -> Any:
    """Parse the command line as Hydra does.

    Raises:
        InputError: if Hydra's parser refuses it.
    """
    from hydra._internal.utils import get_args_parser

    try:
        with contextlib.redirect_stderr(io.StringIO()) as parser_output:
            return get_args_parser().parse_args(arguments)
    except SystemExit:
        raise InputError(
            parser_output.getvalue().strip().rpartition("error: ")[2],
            expected="overrides next to each other, before or after Hydra's flags",
            do=f"see deepclust {verb} --hydra-help",
        ) from None


def check_sweeper(overrides: list[str]) -> None:
    """Refuse a search where the package that searches is missing.

    Raises:
        InputError: naming the extra that brings it.
    """
    if "hydra/sweeper=optuna" not in overrides:
        return
    try:
        is_missing = importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None
    except ModuleNotFoundError:  # without any plugin of Hydra there is not even the package above
        is_missing = True
    if is_missing:
        raise InputError(
            "hydra/sweeper=optuna needs hydra-optuna-sweeper, which is not installed",
            expected="the extra optuna of deepclust",
            do="pip install 'deepclust[optuna]'",
        )


def check_flags(flags: Any, *, config_name: str, config_dir: str | None, overrides: list[str]) -> None:
    """Refuse flags that Hydra would refuse with more than one line.

    Raises:
        InputError: if --config-dir is not a folder or --package is not in the configuration.
    """
    if config_dir is not None and not Path(config_dir).is_dir():
        raise InputError(
            f"--config-dir {config_dir} is no folder",
            expected="a folder with groups of configurations, such as method/mine.yaml",
            do="correct the path",
        )
    if flags.package not in (None, "_global_"):
        from deepclust.config.composition import list_groups_and_keys
        from deepclust.config.suggestions import find_nearest_name

        _, keys = list_groups_and_keys(config_name, config_dir, overrides)
        if keys and flags.package not in keys:
            raise InputError(
                f"--package {flags.package} is not in the configuration",
                expected=find_nearest_name(flags.package, keys) or "the dotted name of a section",
                do="correct the name",
            )
