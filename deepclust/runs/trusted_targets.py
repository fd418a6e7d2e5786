"""What the configuration in a checkpoint may build: whoever uses a run may not know who made it.

A configuration on the command line is the user's own and may name any `_target_`. One that comes with a run is a
stranger's: `open_run_config` lets through what this package uses itself and what the user trusts (`trust=PACKAGE`),
refuses everything else before anything is imported, and takes references (`${...}`) for what they are, a sign that
deepclust did not write it.
"""

import importlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepclust.config import handed_over
from deepclust.config.keys import iterate_entries
from deepclust.config.targets import locate_target
from deepclust.errors import InputError

# What the configurations of this package name for the parts of a run that other commands build again. Functions are
# listed one by one: some of their neighbours write files. tests/runs/test_trusted_targets.py compares with conf/.
TRUSTED_TARGETS = frozenset(
    {
        "deepclust.backbones.pretrained.timm_model",
        "deepclust.datasets.array_files.load_array_file",
        "deepclust.datasets.one_time_conversion.from_class_folders",
        "deepclust.datasets.one_time_conversion.from_torchvision",
        "deepclust.datasets.features.load_features",
        "deepclust.datasets.folder.load_folder",
        "deepclust.datasets.graphs.load_graph",
        "deepclust.datasets.huggingface_datasets.load_huggingface",
        "deepclust.datasets.named_datasets.load_arrays",
        "deepclust.datasets.named_datasets.load_cifar20",
        "deepclust.datasets.named_datasets.load_class_folders",
        "deepclust.datasets.named_datasets.load_embedded_digits",
        "deepclust.datasets.webdataset_shards.load_webdataset",
        "statistics.median",
        "torch.optim.Adam",
        "torch.optim.AdamW",
        "torch.optim.SGD",
    }
)
# Every class that one of these rooms defines is trusted: networks, schedules, transforms and methods compute only.
ROOMS_OF_CLASSES = ("backbones", "methods", "nn", "views")
# Sections that no command builds from a checkpoint: what trained there has done its work.
SECTIONS_NOT_BUILT = ("before", "callbacks", "earlier", "hardware", "logger", "trainer")
# What the commands read of a checkpoint's configuration, and the type that it has.
REQUIRED_KEYS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("method", "dataset", "dataset.source", "views", "multi_view", "names", "evaluation"), dict),
    **dict.fromkeys(("hardware", "trainer", "earlier"), dict),
    **dict.fromkeys(("seed", "batch_size", "clean_batch_size", "dataset.channels", "dataset.image_size"), int),
    **{"dataset.num_clusters": (int, str), "drop_last": int},  # auto: the method has found it
    **{"view_names": list, "data_dir": str},
}
# A configuration that is made up may stand for endless values in a few bytes; the largest of ours has some hundred.
MAX_ENTRIES = 100_000
MAX_BITS = 64  # of an integer
# Arguments of backbones that read or fetch weights. The checkpoint holds the weights: nothing is read a second time.
WEIGHT_SOURCES = {"weights": None, "pretrained": False, "checkpoint_path": None}


def open_run_config(checkpoint: dict[str, Any], *, trust: Iterable[str] = ()) -> DictConfig:
    """Return the configuration in a checkpoint, from which parts may then be built.

    `trust` names packages, or dotted paths, whose classes and functions may be built as well.

    Raises:
        InputError: if it names anything else, or is not as deepclust writes it; it names the key.
    """
    config = read_run_config(checkpoint)
    check_targets({name: node for name, node in config.items() if name not in SECTIONS_NOT_BUILT}, tuple(trust))
    try:
        cfg = OmegaConf.create(config)
    except OmegaConfBaseException as error:
        raise malformed_config_error(str(error).partition("\n")[0]) from error
    assert isinstance(cfg, DictConfig)
    return cfg


def read_run_config(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration in a checkpoint to read or compare: plain values, of which nothing may be built.

    Raises:
        InputError: if deepclust cannot have written it; it names the key.
    """
    config = checkpoint.get("config")
    if not isinstance(config, dict):
        raise malformed_config_error("it has no section config")
    try:
        check_stored_values(config)
        check_required_keys(config)
    except RecursionError:
        raise malformed_config_error("its configuration is nested too deeply") from None
    return config


def without_weight_sources(node: Any) -> Any:
    """Return a section of a run, such as its method, whose backbones neither read nor fetch weights when built."""
    if isinstance(node, list):
        return [without_weight_sources(child) for child in node]
    if not isinstance(node, dict):
        return node
    is_backbone = str(node.get("_target_")).startswith("deepclust.backbones.")
    return {
        name: WEIGHT_SOURCES[name] if is_backbone and name in WEIGHT_SOURCES else without_weight_sources(child)
        for name, child in node.items()
    }


def split_trust(value: Any) -> list[str]:
    """Return the packages of `trust=A,B` or `trust=[A,B]`; none for null."""
    names = value.split(",") if isinstance(value, str) else list(value or ())
    return [name.strip() for name in map(str, names) if name.strip()]


def list_trusted(cfg: DictConfig) -> list[str]:
    """Return what a user's own configuration lets a run name: the packages of `trust`, and whatever it names itself."""
    values: Any = OmegaConf.to_container(cfg)
    values.pop("earlier", None)  # it comes from a run
    return [*split_trust(values.get("trust")), *list_targets(values)]


def list_targets(config: dict[str, Any]) -> list[str]:
    """Return every `_target_` below a section."""
    return [str(target) for _, target in iterate_targets(config)]


def iterate_targets(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of every `_target_` below a section."""
    for key, value in iterate_entries(node):
        if key.rpartition(".")[2] == "_target_":
            yield key, value


def check_stored_values(config: dict[str, Any]) -> None:
    """Refuse references, and values that a configuration cannot hold.

    Raises:
        InputError: naming the key.
    """
    for number, (key, value) in enumerate(iterate_entries(config)):
        if number == MAX_ENTRIES:
            raise malformed_config_error(f"its configuration has more than {MAX_ENTRIES:,} entries")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise malformed_config_error(f"{key} is an integer of {value.bit_length()} bits")
        if isinstance(value, str) and "${" in value:
            raise malformed_config_error(f"{key} is a reference, {shorten(value)}")
        if not (value is None or isinstance(value, bool | int | float | str | list | dict)):
            raise malformed_config_error(f"{key} holds an object of the type {type(value).__name__}")


def check_required_keys(config: dict[str, Any]) -> None:
    """Refuse a configuration that lacks what the commands read, or has it as something else.

    Raises:
        InputError: naming the key.
    """
    values = dict(iterate_entries(config))
    for key, kind in REQUIRED_KEYS.items():
        if not isinstance(values.get(key), kind):
            is_there = key in values
            raise malformed_config_error(f"{key} is {shorten(str(values[key]))}" if is_there else f"it lacks {key}")


def check_targets(config: dict[str, Any], trust: tuple[str, ...]) -> None:
    """Refuse a `_target_` that is neither ours nor trusted.

    Raises:
        InputError: naming the key.
    """
    if missing := handed_over.list_missing(list_targets(config)):
        names = config.get("names")
        raise handed_over.missing_object_error(missing, names if isinstance(names, dict) else {})
    for key, target in iterate_targets(config):
        if isinstance(target, str) and target.startswith(handed_over.PREFIX):
            continue
        if isinstance(target, str) and (is_own_target(target) or is_trusted(target, key, trust)):
            continue
        package = str(target).partition(".")[0]
        own = package == "deepclust"
        raise InputError(
            f"the run names {key}={shorten(str(target))}, which deepclust does not build for a run of unknown origin",
            expected="a class or function that its own configurations use",
            do="use this run with the version of deepclust that made it, if you know where it comes from"
            if own or not package.isidentifier()
            else f"add trust={package} if you know where the run comes from: its code is then run",
        )


def is_own_target(target: str) -> bool:
    """Return whether a dotted path is one of TRUSTED_TARGETS, or a class that one of our rooms defines."""
    if target in TRUSTED_TARGETS:
        return True
    module, _, name = target.rpartition(".")
    package, _, place = module.partition(".")
    if package != "deepclust" or place.partition(".")[0] not in ROOMS_OF_CLASSES:
        return False
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    return inspect.isclass(found) and found.__module__ == module  # and not one that the module imports


def is_trusted(target: str, key: str, trust: tuple[str, ...]) -> bool:
    """Return whether `trust` names the target, or a package that defines it: not one that only imports it."""
    for name in trust:
        if target == name:
            return True
        if target.startswith(f"{name}."):
            module = str(getattr(locate_target(target, key), "__module__", ""))
            if f"{module}.".startswith(f"{name}."):
                return True
    return False


def malformed_config_error(what: str) -> InputError:
    """Return the error for a checkpoint whose configuration deepclust cannot have written."""
    return InputError(
        f"the checkpoint is not as deepclust wrote it: {what}",
        expected="the resolved configuration of the run",
        do="bring back a copy of the run, or train again in another folder (hydra.run.dir=DIR)",
    )


def shorten(text: str, length: int = 100) -> str:
    """Return the beginning of a text, so that it fits in a line."""
    return text if len(text) <= length else f"{text[:length]} ..."
