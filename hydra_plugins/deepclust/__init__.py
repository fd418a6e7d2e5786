"""Where Hydra looks for the launcher `devices`; it takes launchers from packages below `hydra_plugins` only."""

from deepclust.cli.devices_launcher import DevicesLauncher

__all__ = ["DevicesLauncher"]
