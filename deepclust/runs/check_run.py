"""The whole configuration of a run, checked before anything is done that takes time, its earlier stages included."""

import copy

from lightning import Trainer
from omegaconf import DictConfig, OmegaConf, open_dict

from deepclust.config.build import build
from deepclust.config.call_checks import check_calls
from deepclust.engine.devices import check_accelerator
from deepclust.engine.launch import check_launcher
from deepclust.engine.lightning_settings import silence_lightning
from deepclust.engine.precision import check_precision
from deepclust.errors import InputError
from deepclust.runs.earlier_stage import configure_earlier_stage, earlier_stage_keys_named
from deepclust.runs.objective import check_objective
from deepclust.runs.training_length import check_training_length

# Sections that a run builds, and what holds them in the folder of configurations.
BUILT_SECTIONS = {"method": "method", "dataset.source": "dataset", "multi_view": "", "trainer": ""}
OPEN_VALUES = ("num_images", "num_classes", "num_clusters", "image_size", "channels")  # of `dataset`: from the images


def check_run(cfg: DictConfig) -> None:
    """Check every section of a run that is built, every value in it, and the hardware that it asks for.

    Raises:
        InputError: for the first that cannot be used; it names the key to change.
    """
    check_objective(cfg.get("objective"))
    for section in ("hardware", "trainer"):
        check_precision(cfg[section].get("precision"), key=f"{section}.precision")
    check_accelerator(cfg.hardware.accelerator, key="hardware.accelerator")
    check_launcher(cfg.hardware.num_nodes)
    check_stage(cfg)


def check_stage(cfg: DictConfig) -> None:
    """Check the sections of one stage, after those of the stages before it."""
    if cfg.get("before") is not None and cfg.get("start") is None:
        check_is_section(cfg, "before.method", "method")
        with earlier_stage_keys_named(cfg):
            check_stage(configure_earlier_stage(cfg))
    cfg = with_open_values_filled(cfg)
    for key, group in BUILT_SECTIONS.items():
        check_is_section(cfg, key, group)
    check_calls(cfg.dataset.source)
    check_calls(cfg.multi_view)
    check_calls(cfg.method)
    check_num_clusters_agree(cfg)
    for section in ("callbacks", "logger"):
        check_watchers(cfg, section)
    check_training_length(cfg)
    check_trainer(cfg)


def with_open_values_filled(cfg: DictConfig) -> DictConfig:
    """Return a copy in which what only the images tell has some value of its type."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        for name in OPEN_VALUES:
            if cfg.dataset.get(name) in (None, "auto"):
                cfg.dataset[name] = 1
    return cfg


def check_is_section(cfg: DictConfig, key: str, group: str) -> None:
    """Check that a section is there and names what it builds."""
    section = OmegaConf.select(cfg, key)
    if OmegaConf.is_dict(section) and isinstance(section.get("_target_"), str):
        return
    found = "is missing" if section is None else "has no _target_" if OmegaConf.is_dict(section) else f"is {section!r}"
    place = f"the YAML file of the chosen {group}" if group else "the configuration"
    raise InputError(
        f"{key} {found}",
        expected="a section with _target_, the dotted path of a class or function",
        do=f"add {key}._target_ to {place}",
    )


def check_num_clusters_agree(cfg: DictConfig) -> None:
    """Check that the method finds as many clusters as are scored and reported."""
    of_method, of_dataset = cfg.method.get("num_clusters"), cfg.dataset.num_clusters
    if of_method is not None and of_method != of_dataset:
        raise InputError(
            f"method.num_clusters is {of_method} and dataset.num_clusters is {of_dataset}",
            expected="the same number of clusters",
            do=f"set dataset.num_clusters={of_method} and leave method.num_clusters out",
        )


def check_watchers(cfg: DictConfig, section: str) -> None:
    """Check callbacks or loggers, of which each has a name and a section."""
    nodes = cfg.get(section)
    if nodes is None:
        return
    if not OmegaConf.is_dict(nodes):
        raise InputError(f"{section} is {nodes!r}", expected="sections by name", do=f"set {section}.NAME to one")
    for name in nodes:
        check_is_section(cfg, f"{section}.{name}", section)
        node = copy.deepcopy(nodes[name])
        OmegaConf.set_struct(node, False)
        needs = node.pop("needs", {})
        check_calls(node, needs)


def check_trainer(cfg: DictConfig) -> None:
    """Build the trainer, without what watches it: only Lightning knows which of its options go together."""
    silence_lightning()
    trainer: Trainer = build(cfg.trainer, callbacks=[], logger=False, enable_checkpointing=False)
    del trainer
