"""Advice for mistyped names: which known name was most likely meant, and the error that suggests it."""

import difflib
import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING

from deepclust.errors import InputError

if TYPE_CHECKING:  # the command line suggests verbs without waiting for Hydra
    from hydra.core.override_parser.types import Override


def find_nearest_name(word: str, known: Collection[str]) -> str | None:
    """Return the known name that is most likely meant by `word`; None if there is none.

    It is the shortest one that ends in `.word`, else the shortest one with the same first and last part, else one that
    is spelt alike, as a whole and in its last part.
    """
    by_length = sorted(known, key=lambda name: (len(name), name))
    first, last = word.partition(".")[0], word.rpartition(".")[2]
    endings = [name for name in by_length if name.endswith(f".{word}")]
    inside = [name for name in by_length if name.startswith(f"{first}.") and name.endswith(f".{last}")]
    alike = [
        name
        for name in difflib.get_close_matches(word, sorted(known), n=5)
        if difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio() >= 0.6
    ]
    return next(iter([*endings, *inside, *alike]), None)


def suggest_known_key(override: "Override", command: str, groups: Collection[str], keys: Collection[str]) -> InputError:
    """Return the error for a mistyped key, with the known key or group that is most likely meant."""
    line, key = str(override.input_line), override.key_or_group
    section, _, name = key.rpartition(".")
    if section == "trainer" and not override.is_delete() and name in list_trainer_arguments():
        return InputError(
            f"there is no key {key}",
            expected="a key that is there, or + before another argument of lightning.Trainer",
            do=f"write +{line}",
        )
    if override.is_delete() and key in keys:  # Hydra takes null for a key that is not there.
        return InputError(f"{key} is null already", expected="a key with a value", do=f"leave {line} out")
    # A key of Hydra's own and one of the job are not confused.
    candidates = [
        name for name in (*(() if section else groups), *keys) if name.startswith("hydra") == key.startswith("hydra")
    ]
    nearest = find_nearest_name(key, candidates)
    return InputError(
        f"there is no key or group {key}",
        expected=nearest or f"one that {command} --cfg job shows",
        do=f"write {line.replace(key, nearest, 1)}" if nearest else f"leave {line} out",
    )


def list_trainer_arguments() -> Collection[str]:
    """List the arguments of Lightning's Trainer. Importing it takes seconds, which only such a mistake costs."""
    from lightning import Trainer

    return inspect.signature(Trainer).parameters
