"""The dotted keys of a configuration."""

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


def list_keys(cfg: Any) -> list[str]:
    """List every dotted key of a configuration."""
    return [key for key, _ in iterate_entries(OmegaConf.to_container(cfg))]
