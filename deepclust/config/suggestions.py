"""Advice for mistyped names: which known name was most likely meant, and the error that suggests it."""

import difflib
import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING

from deepclust.errors import InputError

if TYPE_CHECKING:  # the command line suggests verbs without waiting for Hydra
    from hydra.core.override_parser.types import Override


def find_nearest_name(word: str, known: Collection[str]) -> str | None:
    """Return the shortest known name that ends in `.word`, else the one spelt most alike, else None."""
    endings = sorted((name for name in known if name.endswith(f".{word}")), key=len)
    candidates = endings or difflib.get_close_matches(word, sorted(known), n=1)
    return candidates[0] if candidates else None


def suggest_known_key(override: "Override", command: str, known: Collection[str]) -> InputError:
    """Return the error for a mistyped key, with the known key or group that is spelt most alike."""
    line, key = str(override.input_line), override.key_or_group
    section, _, name = key.rpartition(".")
    if section == "trainer" and not override.is_delete() and name in list_trainer_arguments():
        return InputError(
            f"there is no key {key}",
            expected="a key that is there, or + before another argument of lightning.Trainer",
            do=f"write +{line}",
        )
    # A key of Hydra's own and one of the job are not confused.
    candidates = [name for name in known if name.startswith("hydra") == key.startswith("hydra")]
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
