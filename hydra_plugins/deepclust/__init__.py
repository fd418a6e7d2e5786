"""Where Hydra looks for the launcher `devices`; it takes launchers from packages below `hydra_plugins` only.

Hydra imports this at each start, so the launcher itself is imported when it is asked for.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "DevicesLauncher":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deepclust.cli.devices_launcher import DevicesLauncher

    return DevicesLauncher
