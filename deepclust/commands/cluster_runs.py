"""The clusterings of `deepclust cluster`: a run of `deepclust train` on the features for each rule and seed."""

import logging
from pathlib import Path

from omegaconf import DictConfig, open_dict

from deepclust.commands.cluster_network import compose_for_cluster, make_key, read_features_key, run_or_resume
from deepclust.config.build import build
from deepclust.config.plain_values import resolve_to_dict
from deepclust.datasets.mapped_arrays import map_array
from deepclust.engine.plurals import format_count
from deepclust.runs.results import read_results
from deepclust.runs.resume_checks import select_clustering_changes

log = logging.getLogger(__name__)


def cluster_features(
    features: Path, cfg: DictConfig, rule: str, num_clusters: int, seed: int, *, name: str, folder: Path
) -> Path:
    """Cluster the features by one rule with one seed, unless that is done already; return its run folder."""
    made_of = [
        read_features_key(features),
        *(rule, num_clusters, seed),
        *(resolve_to_dict(cfg.evaluation), cfg.min_steps, cfg.max_steps),
        *list_sample(features, cfg),
        *list_clustering_changes(cfg),
    ]
    run_folder = folder / "clusters" / f"{rule}-{num_clusters}-seed{seed}-{make_key(made_of)}"
    if read_results(run_folder) is not None:
        return run_folder
    run_cfg = configure_rule(features, cfg, rule, num_clusters, seed, name=name)
    run_cfg.evaluation = cfg.evaluation
    if rule == "lnscc":
        run_cfg.start = str(train_embedding(features, cfg, seed, name=name, folder=folder))
        done, run_cfg.method.centres_after_epochs = run_cfg.method.centres_after_epochs, 0
        run_cfg.method.clustering_after_epochs -= done
        run_cfg.trainer.max_epochs = max(1, run_cfg.trainer.max_epochs - done)
    log.info("%s by %s, seed %d", format_count(num_clusters, "cluster"), rule, seed)
    run_or_resume(run_cfg, run_folder)
    return run_folder


def train_embedding(features: Path, cfg: DictConfig, seed: int, *, name: str, folder: Path) -> Path:
    """Train LNSCC up to where it sets centres, the same whatever the number of clusters; return its run folder."""
    made_of = [read_features_key(features), seed, cfg.min_steps, cfg.max_steps, *list_sample(features, cfg)]
    made_of += list_clustering_changes(cfg)
    run_folder = folder / "clusters" / f"embedding-seed{seed}-{make_key(made_of)}"
    if read_results(run_folder) is None:
        run_cfg = configure_rule(features, cfg, "lnscc", 1, seed, name=name)
        run_cfg.trainer.max_epochs = run_cfg.method.centres_after_epochs
        log.info("embedding, seed %d", seed)
        run_or_resume(run_cfg, run_folder)
    return run_folder


def list_sample(features: Path, cfg: DictConfig) -> list[int]:
    """Return what decides which vectors are trained on: nothing unless there are more than `cfg.max_fitted`."""
    return [cfg.max_fitted, cfg.seed] if len(map_array(features / "train_features.npy")) > cfg.max_fitted else []


def list_clustering_changes(cfg: DictConfig) -> list[str]:
    """Return the keys of `clustering` that are not the default: what is made with them has another name."""
    return [f"{name}={value}" for name, value in select_clustering_changes(cfg.clustering).items()]


def configure_clustering(cfg: DictConfig, features: Path, *overrides: str) -> DictConfig:
    """Return a configuration of `deepclust train` on the features."""
    run_cfg = compose_for_cluster(cfg, "train", "dataset=features", *overrides)
    run_cfg.dataset.path = str(features)
    run_cfg.clustering = cfg.clustering
    if list_sample(features, cfg):  # without the keys, the recipe is what it was before there were any
        with open_dict(run_cfg.dataset.source):
            run_cfg.dataset.source.update({"max_fitted": cfg.max_fitted, "seed": cfg.seed})
    return run_cfg


def configure_rule(
    features: Path, cfg: DictConfig, rule: str, num_clusters: int, seed: int, *, name: str
) -> DictConfig:
    """Return the configuration of `deepclust train` that clusters the features by that rule."""
    run_cfg = configure_clustering(cfg, features, f"method={rule}", "~callbacks.evaluation")
    run_cfg.dataset.name = name
    run_cfg.dataset.num_clusters = num_clusters
    run_cfg.seed = seed
    run_cfg.report.map_points = run_cfg.report.per_cluster = 0  # the report of the whole command has map and pictures
    run_cfg.names.method, run_cfg.names.backbone = rule, run_cfg.names.backbone or "identity"
    num_images = len(build(run_cfg.dataset.source).fit)
    run_cfg.batch_size = min(run_cfg.batch_size, num_images)
    if rule == "lnscc":
        steps_per_epoch = num_images // run_cfg.batch_size
        # Long enough for a few images and not too long for many; the parts are those of conf/method/lnscc.yaml.
        usual_steps = run_cfg.trainer.max_epochs * steps_per_epoch
        epochs = min(max(usual_steps, cfg.min_steps), cfg.max_steps) / steps_per_epoch
        factor = epochs / run_cfg.trainer.max_epochs
        run_cfg.trainer.max_epochs = max(1, round(epochs))
        for stage in ("centres_after_epochs", "clustering_after_epochs"):
            run_cfg.method[stage] = max(1, round(run_cfg.method[stage] * factor))
        run_cfg.method.backbone.num_features = 32  # whatever the number of clusters
        if num_images < 5000:
            run_cfg.method.backbone.hidden_sizes = [256, 128]  # as on the digits
    return run_cfg
