"""The values of a configuration, resolved to plain ones."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepclust.config.keys import iterate_entries
from deepclust.config.missing_values import explain_value_error, missing_value_error


def resolve_to_dict(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration as nested dictionaries and lists, with references resolved.

    Raises:
        InputError: if keys have no value yet, or a reference leads nowhere; it names them.
    """
    entries = iterate_entries(OmegaConf.to_container(cfg), cfg._get_full_key(""))
    if missing := [key for key, value in entries if value == "???"]:
        raise missing_value_error(*missing)
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explain_value_error(error) from error
    return values
