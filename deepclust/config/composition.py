"""How configurations are composed: from which package, by which of Hydra's rules, and what can be overridden."""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, safe_load

from deepclust.config.keys import list_keys
from deepclust.engine.small_files import read_yaml

CONFIG_PACKAGE = "deepclust.conf"
VERSION_BASE = "1.3"  # the version of Hydra whose behaviour the configurations are written for
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError)

# ${last_part:PATH}: the name of a file or folder, without those above it.
OmegaConf.register_new_resolver("last_part", lambda path: Path(os.path.abspath(path)).name, replace=True)


def name_job_folder(number: int, sweep_folder: str, sweeper: str, overrides: Sequence[str]) -> str:
    """Return the name of the folder of a job: its number in the sweep.

    A sweeper that searches begins again with 0 when it goes on with a study, and proposes other values. Its job has a
    folder of its own where the one of its number holds other overrides.
    """
    if sweeper.endswith(".BasicSweeper"):  # the values are those on the command line: the numbers tell the jobs apart
        return str(number)
    try:
        earlier = read_yaml(Path(sweep_folder) / str(number) / ".hydra" / "overrides.yaml")
    except (OSError, ValueError):  # nothing has run there
        return str(number)
    if earlier == list(overrides):
        return str(number)
    return f"{number}-{sha256(json.dumps(list(overrides)).encode()).hexdigest()[:8]}"


# ${job_folder:NUMBER,SWEEP_FOLDER,SWEEPER,OVERRIDES}
OmegaConf.register_new_resolver("job_folder", name_job_folder, replace=True)


def read_defaults(group: str) -> dict[str, Any]:
    """Return the values of the option `default` of a group of ours, which refers to no other keys."""
    file = resources.files(CONFIG_PACKAGE).joinpath(group, "default.yaml")
    values: dict[str, Any] = safe_load(file.read_text(encoding="utf-8"))
    return values


def list_groups_and_keys(
    config_name: str,
    config_dir: str | None,
    overrides: Sequence[str],
    *,
    list_keys: Callable[[DictConfig], list[str]] = list_keys,
) -> tuple[list[str], list[str]]:
    """Return the groups and the dotted keys that can be overridden, as far as the configuration composes.

    Without `overrides` where it does not compose with them; nothing where it does not compose at all. `list_keys` says
    which keys are meant.
    """
    searchpath = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    for accepted in (overrides, []):
        try:
            with (
                warnings.catch_warnings(action="ignore"),
                initialize_config_module(CONFIG_PACKAGE, version_base=VERSION_BASE),
            ):
                cfg = compose(config_name, overrides=[*accepted, *searchpath], return_hydra_config=True)
                groups, keys = GlobalHydra.instance().config_loader().list_groups(""), list_keys(cfg)
        except COMPOSITION_ERRORS:
            continue
        return groups, keys
    return [], []


def list_options(group: str, config_name: str, config_dir: str | None, overrides: Sequence[str]) -> list[str]:
    """Return the options of a group, those of the user's folders included; nothing where there is no such group."""
    options: list[str] = []

    def read_options(cfg: DictConfig) -> list[str]:
        options.extend(GlobalHydra.instance().config_loader().get_group_options(group))
        return []

    list_groups_and_keys(config_name, config_dir, overrides, list_keys=read_options)
    return options
