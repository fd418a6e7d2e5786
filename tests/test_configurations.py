"""Every configuration file composes and builds."""

from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from deepclust.commands.train import configure_earlier_stage
from deepclust.config.build import build
from deepclust.config.values import resolve_to_dict
from tests.conftest import compose_train

CONF = Path(__file__).parents[1] / "conf"
# What a configuration leaves to the user, so that it can be composed here.
OPEN = ["dataset.num_images=64", "dataset.channels=3"]


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("group", ["method", "backbone", "dataset", "views", "hardware", "logger", "callbacks"])
def test_group_composes(group):
    for option in options(group):
        fill = ["backbone.model_name=resnet18"] if option == "timm" else []
        fill += ["dataset.path=x", "dataset.num_clusters=2"] if option in ("folder", "arrays", "features") else []
        resolve_to_dict(compose_train(f"{group}={option}", *fill))


@pytest.mark.parametrize("name", options("experiment"))
def test_experiment_composes_and_builds(name):
    cfg = compose_train(f"experiment={name}", *OPEN[:1])
    cfg.dataset.num_images = 64
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# ") and f"experiment={name}" in text, "a header says what is claimed"
    build(cfg.multi_view)
    method = build_with_stages(cfg)
    method.parameter_groups()
    assert name.startswith(cfg.names.method) or name.endswith(cfg.names.method)


def build_with_stages(cfg):
    """The method of a configuration, told of the stage before as a run would be."""
    if OmegaConf.is_missing(cfg, "start"):
        cfg.start = "a run of CC, say"
        cfg.earlier.method = resolve_to_dict(compose_train("method=cc", "dataset=cifar10"))["method"]
        cfg.earlier.method.num_clusters = cfg.dataset.num_clusters
    elif cfg.before is not None:
        build_with_stages(earlier := configure_earlier_stage(cfg))
        cfg.earlier.method = resolve_to_dict(earlier)["method"]
    return build(cfg.method)


@pytest.mark.parametrize("name", options("recipe"))
def test_recipe_is_taken_for_its_method_and_data_set(name):
    method = max((m for m in options("method") if name.startswith(f"{m}_")), key=len)
    cfg = compose_train(f"method={method}", f"dataset={name.removeprefix(f'{method}_')}")
    cfg.dataset.num_images = 64
    build(cfg.multi_view)
    build_with_stages(cfg)


@pytest.mark.parametrize("name", options("hardware"))
def test_hardware_builds(name, monkeypatch):
    cfg = compose_train(f"hardware={name}")
    build(cfg.hardware.strategy) if not isinstance(cfg.hardware.strategy, str) else None


def test_a_misspelt_key_is_refused():
    with pytest.raises(ConfigCompositionException, match="max_epoch"):
        compose_train("trainer.max_epoch=3")


def test_precedence_is_experiment_recipe_dataset_method():
    assert compose_train("method=propos", "dataset=cifar10").batch_size == 512  # the method's
    assert compose_train("method=propos", "dataset=digits").batch_size == 256  # the recipe's
    cfg = compose_train("experiment=propos_cifar20")
    assert (cfg.batch_size, cfg.dataset.name) == (256, "cifar20")
    assert compose_train("experiment=propos_cifar20", "batch_size=64").batch_size == 64
