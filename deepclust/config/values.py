"""The values of a configuration: resolved to plain ones, listed by dotted key, and checked before any work."""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepclust.config.keys import iterate_entries
from deepclust.config.value_errors import explain_value_error, missing_value_error
from deepclust.errors import InputError

# The least value of whole numbers that no constructor checks.
LEAST_VALUES = {"batch_size": 1, "clean_batch_size": 1, "trainer.max_epochs": 0, "seed": -(2**63)}


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


def check_whole_numbers(values: dict[str, Any]) -> None:
    """Check the whole numbers of LEAST_VALUES, those of earlier stages too.

    Raises:
        InputError: if one is not a whole number, or too small or large; it names the key.
    """
    for key, value in iterate_entries(values):
        least = LEAST_VALUES.get(re.sub(r"^((before|network)\.)+", "", key))
        # In `network` of conf/cluster.yaml, null stands for a number that is worked out later.
        if least is None or (value is None and key.startswith("network.")):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            limits = "between -2^63 and 2^63" if least < 0 else f"{least} or more"
            raise InputError(
                f"{key} is {value!r}", expected=f"a whole number, {limits}", do=f"set {key} to such a number"
            )
