"""Every file of conf/ composes, and experiments and recipes build."""

from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from deepclust.config.build import build
from deepclust.config.plain_values import resolve_to_dict
from deepclust.runs.earlier_stage import configure_earlier_stage
from tests.conftest import compose_train

CONF = Path(__file__).parents[1] / "conf"


def list_options(group: str) -> list[str]:
    """Return the names of the options of a group of configurations."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("group", ["method", "backbone", "dataset", "views", "hardware", "logger", "callbacks"])
def test_options_of_a_group_compose(group):
    for option in list_options(group):
        required = ["backbone.model_name=resnet18"] if option == "timm" else []
        if option in ("folder", "arrays", "features", "webdataset", "huggingface"):
            required += ["dataset.path=x", "dataset.num_clusters=2"]
        resolve_to_dict(compose_train(f"{group}={option}", *required))


@pytest.mark.sampled
@pytest.mark.parametrize("name", list_options("experiment"))
def test_experiment_composes_and_builds(name):
    cfg = compose_train(f"experiment={name}", "dataset.num_images=64")
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# ") and f"experiment={name}" in text, (
        "the header must name the command"
    )
    build(cfg.multi_view)
    method = build_with_stages(cfg)
    method.parameter_groups()
    assert name.startswith(cfg.names.method) or name.endswith(cfg.names.method)


def build_with_stages(cfg):
    """Build the method of a configuration, after that of its earlier stage, as a run does."""
    if OmegaConf.is_missing(cfg, "start"):
        cfg.start = "a run of any method, here CC"
        cfg.earlier.method = resolve_to_dict(compose_train("method=cc", "dataset=cifar10"))["method"]
        cfg.earlier.method.num_clusters = cfg.dataset.num_clusters
    elif cfg.before is not None:
        build_with_stages(earlier := configure_earlier_stage(cfg))
        cfg.earlier.method = resolve_to_dict(earlier)["method"]
    return build(cfg.method)


@pytest.mark.sampled
@pytest.mark.parametrize("name", list_options("recipe"))
def test_recipe_builds_with_its_method_and_data_set(name):
    method = max((m for m in list_options("method") if name.startswith(f"{m}_")), key=len)
    dataset = name.removeprefix(f"{method}_")
    takes_vectors = dataset in ("features", "graph")
    required = ["dataset.path=x", "dataset.num_clusters=2", "dataset.channels=3"] if takes_vectors else []
    cfg = compose_train(f"method={method}", f"dataset={dataset}", *required)
    cfg.dataset.num_images = 64
    build(cfg.multi_view)
    build_with_stages(cfg)


@pytest.mark.parametrize("name", list_options("hardware"))
def test_hardware_builds(name, monkeypatch):
    cfg = compose_train(f"hardware={name}")
    if not isinstance(cfg.hardware.strategy, str):
        build(cfg.hardware.strategy)


def test_misspelt_key_is_refused():
    with pytest.raises(ConfigCompositionException, match="max_epoch"):
        compose_train("trainer.max_epoch=3")


def test_precedence_is_experiment_recipe_dataset_method():
    assert compose_train("method=propos", "dataset=cifar10").batch_size == 512  # from the method
    assert compose_train("method=propos", "dataset=digits").batch_size == 256  # from the recipe
    cfg = compose_train("experiment=propos_cifar20")
    assert (cfg.batch_size, cfg.dataset.name) == (256, "cifar20")
    assert compose_train("experiment=propos_cifar20", "batch_size=64").batch_size == 64
