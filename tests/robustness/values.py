"""Values at which keys of configurations are tried, and the check of a whole configuration without a training."""

import math
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from deepclust.config.build import build
from deepclust.config.plain_values import resolve_to_dict
from deepclust.config.schema import check_plain_values
from deepclust.errors import InputError
from deepclust.runs.check_run import check_run, fill_open_values_with_ones

VALUES: list[Any] = [0, -1, math.nan, math.inf, 1e308, "abc", True, None, []]


def iterate_leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the dotted keys below a section that hold a number, a boolean or a list, with their values."""
    for name in node if OmegaConf.is_dict(node) else range(len(node)):
        key = f"{prefix}.{name}" if prefix else str(name)
        if name == "_args_":  # without names, of functions that do not check them
            continue
        if OmegaConf.is_missing(node, name):
            continue
        value = node[name]
        if OmegaConf.is_config(value) and (OmegaConf.is_dict(value) or any(map(OmegaConf.is_config, value))):
            if not OmegaConf.is_interpolation(node, name):
                yield from iterate_leaves(value, key)
        elif isinstance(value, bool | int | float) or OmegaConf.is_list(value):
            yield key, value


def refusal(cfg: DictConfig) -> InputError | None:
    """Return why `deepclust train` refuses a configuration before it opens the images; None if it does not."""
    try:
        check_plain_values(resolve_to_dict(cfg))
        check_run(cfg)
    except InputError as error:
        return error
    return None


def try_values(cfg: DictConfig, section: str, seen: set[tuple[str, str]]) -> tuple[int, list[str]]:
    """Set each key of a section to each of VALUES in turn; return the number of cases, and the bad ones with reasons.

    A case is good if it is refused with a message that names the key, or if what it describes can be built. An argument
    of a target (or a section) that is in `seen` is left out; the others are added to it.
    """
    OmegaConf.set_struct(cfg, False)
    num_cases, bad = 0, []
    root = cfg if not section else OmegaConf.select(cfg, section)
    for key, value in list(iterate_leaves(root, section)):
        parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
        name = key.rpartition(".")[2]
        target = parent.get("_target_", key.rpartition(".")[0]) if OmegaConf.is_dict(parent) else key
        if (target, name) in seen:
            continue
        seen.add((target, name))
        child = int(name) if OmegaConf.is_list(parent) else name
        before = OmegaConf.to_container(parent)[child]  # a reference stays one
        for tried in VALUES:
            parent[child] = tried
            num_cases += 1
            try:
                error = refusal(cfg)
                if error is None:
                    build_parts(cfg)
                elif not names_key(str(error), key):
                    bad.append(f"{key}={tried!r}: {error}")
            except Exception as error:
                bad.append(f"{key}={tried!r} (instead of {value!r}): {type(error).__name__}: {error}")
        parent[child] = before
    return num_cases, bad


def names_key(message: str, key: str) -> bool:
    """Return whether a message names a key, or the list that it stands in."""
    message = re.sub(r"\[(\d+)\]", r".\1", message)  # of lists, as in a.b[0].c
    return key in message or (key.rpartition(".")[2].isdigit() and key.rpartition(".")[0] in message)


def build_parts(cfg: DictConfig) -> None:
    """Build what an accepted configuration describes, as far as no images are needed."""
    cfg = fill_open_values_with_ones(cfg)
    try:
        build(cfg.multi_view)
        build(cfg.method)
    except InputError:  # a constructor's own refusal comes before the training, too
        pass
