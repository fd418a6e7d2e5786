"""The whole configuration of a run, checked before anything is done that takes time, its earlier stages included."""

import copy
from collections.abc import Mapping

from lightning import Trainer
from omegaconf import DictConfig, OmegaConf, open_dict

from deepclust.clustering.backend import check_backend
from deepclust.config.build import build
from deepclust.config.call_checks import check_calls
from deepclust.config.override_format import format_override, format_value
from deepclust.config.targets import locate_target
from deepclust.datasets.batch_checks import check_batch_statistics
from deepclust.engine.devices import check_accelerator
from deepclust.engine.launch import check_launcher
from deepclust.engine.lightning_settings import silence_lightning
from deepclust.engine.precision import check_precision
from deepclust.errors import InputError
from deepclust.runs.assemble import NAMES_IN_NEEDS, build_method
from deepclust.runs.earlier_stage import configure_earlier_stage, name_keys_of_earlier_stage
from deepclust.runs.objective import check_objective
from deepclust.runs.training_length import refuse_fast_dev_run

# Sections that a run builds, and what holds them in the folder of configurations.
BUILT_SECTIONS = {"method": "method", "dataset.source": "dataset", "multi_view": "", "trainer": ""}
# Keys of `dataset` that may be left to the images
NUMBERS_FROM_IMAGES = ("num_images", "num_classes", "num_clusters", "image_size", "channels")


def check_run(cfg: DictConfig) -> None:
    """Check every section of a run that is built, every value in it, and the hardware that it asks for.

    Raises:
        InputError: for the first that cannot be used; it names the key to change.
    """
    check_objective(cfg.get("objective"))
    check_backend(cfg.clustering.backend, cfg.clustering.neighbor_index)
    for section in ("hardware", "trainer"):
        check_precision(cfg[section].get("precision"), key=f"{section}.precision")
    check_accelerator(cfg.hardware.accelerator, key="hardware.accelerator")
    check_launcher(cfg.hardware.num_nodes)
    check_stage(cfg)
    num_nodes = cfg.trainer.get("num_nodes")
    if isinstance(num_nodes, int):
        check_launcher(num_nodes, key="trainer.num_nodes")


def check_stage(cfg: DictConfig) -> None:
    """Check the sections of one stage, after those of the stages before it.

    Raises:
        InputError: for the first that cannot be used; it names the key to change.
    """
    if cfg.get("before") is not None and cfg.get("start") is None:
        check_is_section(cfg, "before.method", "method")
        with name_keys_of_earlier_stage(cfg):
            check_stage(configure_earlier_stage(cfg))
    cfg = fill_open_values_with_ones(cfg)
    for key, group in BUILT_SECTIONS.items():
        check_is_section(cfg, key, group)
    check_calls(cfg.dataset.source)
    check_calls(cfg.multi_view)
    check_calls(cfg.method)
    check_num_clusters_agree(cfg)
    check_num_views(cfg)
    if cfg.get("before") is not None and cfg.get("start") is None:
        check_batch_of_one(cfg)
    for section in ("callbacks", "logger"):
        check_callbacks_or_loggers(cfg, section)
    refuse_fast_dev_run(cfg)
    check_trainer(cfg)


def fill_open_values_with_ones(cfg: DictConfig) -> DictConfig:
    """Return a copy in which the numbers that only the images tell are 1, so that all values can be checked."""
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        for name in NUMBERS_FROM_IMAGES:
            if cfg.dataset.get(name) in (None, "auto"):
                cfg.dataset[name] = 1
    return cfg


def check_batch_of_one(cfg: DictConfig) -> None:
    """Refuse a batch of one image where the network normalises over batches, before the stage before is trained.

    Raises:
        InputError: if that is so.
    """
    if cfg.batch_size == 1 and cfg.trainer.max_epochs > 0:
        try:
            method = build_method(cfg)
        except InputError:  # of what depends on the images, which are not there yet
            return
        check_batch_statistics(method, [1], batch_size=1, num_processes=1)


def check_is_section(cfg: DictConfig, key: str, group: str) -> None:
    """Check that a section is there and names what it builds.

    Raises:
        InputError: if not; it names the key. `group` is the group of options whose file holds the section, or empty.
    """
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
    """Check that the method finds as many clusters as are scored and reported.

    Raises:
        InputError: if not.
    """
    of_dataset = cfg.dataset.num_clusters
    # `+num_clusters=3` adds a key that nothing reads.
    others = {"method.num_clusters": cfg.method.get("num_clusters"), "num_clusters": cfg.get("num_clusters")}
    for key, number in others.items():
        if number is not None and number != of_dataset:
            raise InputError(
                f"{key} is {number} and dataset.num_clusters is {of_dataset}",
                expected="the same number of clusters",
                do=f"set dataset.num_clusters={number} and leave {key} out",
            )


def check_num_views(cfg: DictConfig) -> None:
    """Check that an image has as many views as the method compares, where it tells how many these are."""
    method = locate_target(cfg.method._target_, "method._target_")
    expected, found = getattr(method, "num_views", None), len(cfg.view_names)
    if expected is not None and found != expected:
        raise InputError(
            f"view_names is {format_value(list(cfg.view_names))}, {found} view{'' if found == 1 else 's'} of an image",
            expected=f"{expected}, which {method.__name__} compares",
            do=f"set {format_override('view_names', [*cfg.view_names, cfg.view_names[-1]][:expected])}",
        )


def check_callbacks_or_loggers(cfg: DictConfig, section: str) -> None:
    """Check the sections of all callbacks, or of all loggers; `section` is "callbacks" or "logger".

    Raises:
        InputError: for the first that cannot be built.
    """
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
        is_mapping = isinstance(needs, Mapping | DictConfig)
        if not is_mapping or any(needed not in NAMES_IN_NEEDS for needed in needs.values()):
            raise InputError(
                f"{section}.{name}.needs is {needs!r}",
                expected=f"for each argument one of {', '.join(NAMES_IN_NEEDS)}",
                do=f"leave {section}.{name}.needs out, or change it in the YAML file of {section}",
            )
        check_calls(node, needs)


def check_trainer(cfg: DictConfig) -> None:
    """Build the trainer, without callbacks and loggers: only Lightning knows which of its options go together."""
    silence_lightning()
    trainer: Trainer = build(cfg.trainer, callbacks=[], logger=False, enable_checkpointing=False)
    del trainer
