"""The dotted keys of a configuration."""

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf


def iterate_entries(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over every dotted key below `node`, with its value; sections are entries too."""
    if isinstance(node, dict | list):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            key = f"{prefix}.{name}" if prefix else str(name)
            yield key, child
            yield from iterate_entries(child, key)


def list_settable_keys(cfg: Any) -> list[str]:
    """List every dotted key that holds a value of its own, and can be given another one on the command line.

    Sections do not, and a reference to a key of the same name leaves its value to that key.
    """
    keys = []
    for key, value in iterate_entries(OmegaConf.to_container(cfg)):
        *above, name = key.split(".")
        is_in_list, is_for_hydra = any(part.isdigit() for part in (*above, name)), name.startswith("_")
        refers_to_same_name = re.fullmatch(rf"\$\{{\.*([\w.]*\.)?{re.escape(name)}\}}", str(value))
        if not (isinstance(value, dict) or is_in_list or is_for_hydra or refers_to_same_name):
            keys.append(key)
    return keys


def list_keys(cfg: Any) -> list[str]:
    """List every dotted key of a configuration."""
    return [key for key, _ in iterate_entries(OmegaConf.to_container(cfg))]
