"""The result of `deepclust cluster`: one run folder in which the network and the clusters are one model."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from deepclust.callbacks.last_checkpoint import CHECKPOINT_FORMAT
from deepclust.clustering.number_of_clusters import ClusterNumberEstimate
from deepclust.commands.cluster_findings import describe_what_is_shown, find_in_images
from deepclust.commands.cluster_trust import measure_trust
from deepclust.config.build import build
from deepclust.config.plain_values import resolve_to_dict
from deepclust.datasets.image_sources import ImageSet
from deepclust.engine.devices import select_device
from deepclust.engine.output_files import write_bytes
from deepclust.runs.assemble import build_datamodule, build_evaluator
from deepclust.runs.checkpoint import load_checkpoint, load_method
from deepclust.runs.names_json import NAMES, read_names, write_names
from deepclust.runs.provenance import read_command_line
from deepclust.runs.results import (
    describe_estimate,
    forget_results_set_aside,
    read_latest_results,
    read_results,
    set_results_aside,
)
from deepclust.runs.run_folder import CHECKPOINT, METRICS_FILE
from deepclust.runs.trusted_targets import list_trusted
from deepclust.runs.write_run import write_run


def write_model(
    cfg: DictConfig,
    folder: Path,
    root: Path,
    images: ImageSet,
    network_cfg: DictConfig | None,
    network_run: Path | None,
    features: Path,
    runs: dict[int, Path],
    estimate: ClusterNumberEstimate | None,
) -> dict[str, Any]:
    """Write the run folder of the whole command and return the content of its results.json.

    `runs` are the clusterings by seed; that of `cfg.seed` is the result, the others tell how far it repeats.
    `root` is where the images are. `network_run` is the run of a network trained on these images, None for a ready-made
    one. `network_cfg` is None for vectors, which need no network: then the model is that of the clustering.
    """
    first_run = runs[cfg.seed]
    checkpoint = load_checkpoint(first_run)
    vectors_cfg, method = load_method(checkpoint, trust=list_trusted(cfg))
    vectors_cfg.dataset.source.path = str(features)  # the folder may have been moved since
    vectors: ImageSet = build(vectors_cfg.dataset.source)
    evaluator = build_evaluator(vectors_cfg, vectors)
    device = select_device(cfg.hardware.accelerator)
    evaluation = evaluator(method.to(device), build_datamodule(vectors_cfg, vectors))

    if network_cfg is None:
        model_cfg, state_dict = vectors_cfg, checkpoint["state_dict"]
        model_cfg.report, model_cfg.evaluation = cfg.report, cfg.evaluation
    else:
        model_cfg = stack_configs(network_cfg, vectors_cfg)
        model_cfg.report, model_cfg.evaluation = cfg.report, cfg.evaluation
        model_cfg.clustering = cfg.clustering
        network = open_network(cfg, network_cfg, network_run)
        model = build(model_cfg.method)
        model.load_state_dict(
            {f"backbone.first.{name}": value for name, value in network.state_dict().items()}
            | {stacked_weight_name(name): value for name, value in checkpoint["state_dict"].items()}
        )
        state_dict = model.state_dict()
    earlier = read_latest_results(folder) or {}
    set_results_aside(folder)
    file = folder / CHECKPOINT
    file.parent.mkdir(exist_ok=True)
    content = {"format": CHECKPOINT_FORMAT, "state_dict": state_dict, "config": resolve_to_dict(model_cfg)}
    buffer = io.BytesIO()
    torch.save(content | evaluation.assignment_state, buffer)
    write_bytes(file, buffer.getbuffer())

    is_own_network = network_run is not None
    results = (read_results(first_run) or {}) | {
        "backbone": model_cfg.names.backbone,
        "command": read_command_line(),
        "images": str(root),
        "num_images": len(vectors.evaluation),  # that of the run is the number that it was trained on
        "run": str(first_run),
        "trust": measure_trust(cfg, vectors, evaluation.health, runs, is_own_network=is_own_network),
    }
    if images.unreadable:
        results["unreadable"] = [list(item) for item in images.unreadable]
    results.pop("baseline", None)  # it is of the features; that of the pixels follows
    pixel_evaluator = replace(evaluator, images=images.evaluation, labels=images.labels)
    pixel_scores = pixel_evaluator.score_pixels(max_values=vectors_cfg.pixel_baseline_max_values)
    if pixel_scores is not None:
        results["baseline"] = {"kmeans_on_pixels": pixel_scores}
    if network_run is not None:
        results["timing"]["earlier_seconds"] += (read_results(network_run) or {})["timing"]["train_seconds"]
    if estimate is not None:
        results["number"] = describe_estimate(estimate)
    if (first_run / METRICS_FILE).is_file():
        write_bytes(folder / METRICS_FILE, (first_run / METRICS_FILE).read_bytes())
    # The map shows the network's features: on LNSCC's own, clusters are apart whatever the images, by its training.
    # They are mapped, not read: what follows looks at them in blocks, or at some of them.
    rows = torch.from_numpy(np.load(features / "train_features.npy", mmap_mode="c"))
    findings = find_in_images(
        cfg,
        images,
        rows.numpy(),
        evaluation.assignments.numpy(),
        network_cfg=network_cfg,
        is_own_network=is_own_network,
    )
    are_same_clusters = Path(earlier.get("run", "")).name == first_run.name  # wherever the folder lies by now
    if not (are_same_clusters and (folder / NAMES).exists()):  # somebody may have changed them
        forget_results_set_aside(folder)  # the names will no longer be those of the earlier clusters
        write_names(folder, findings.names, earlier=earlier.get("names", {}))
    results |= findings.summarize() | {"shown": describe_what_is_shown(cfg)}
    shown = replace(findings, names=read_names(folder))
    write_run(folder, results, replace(evaluation, features=rows), images, model_cfg, findings=shown)
    return results


def open_network(cfg: DictConfig, network_cfg: DictConfig, network_run: Path | None) -> Any:
    """Return the network that made the features: a ready-made one, or that of the run that trained it."""
    if network_run is None:
        return build(network_cfg.backbone)
    return load_method(load_checkpoint(network_run), trust=list_trusted(cfg))[1].backbone


def stack_configs(network_cfg: DictConfig, vectors_cfg: DictConfig) -> DictConfig:
    """Return the configuration of the method of `vectors_cfg` on images: behind the network of `network_cfg`."""
    backbone, stacked = resolve_to_dict(network_cfg)["backbone"], resolve_to_dict(network_cfg)
    # The checkpoint holds the weights: none are read or fetched when the model is built again.
    backbone |= {name: none for name, none in (("weights", None), ("pretrained", False)) if name in backbone}
    vectors = resolve_to_dict(vectors_cfg)
    method = vectors["method"]
    method["backbone"] = {
        "_target_": "deepclust.backbones.stacked.Stacked",
        "first": backbone,
        "then": method["backbone"],
    }
    stacked |= {name: vectors[name] for name in ("batch_size", "drop_last", "seed", "trainer", "view_names")}
    stacked |= {"method": method, "backbone": backbone}
    stacked["multi_view"] |= {"names": stacked["view_names"]}
    stacked["dataset"]["num_clusters"] = vectors_cfg.dataset.num_clusters
    stacked["names"]["method"] = vectors_cfg.names.method
    stacked_cfg = OmegaConf.create(stacked)
    assert isinstance(stacked_cfg, DictConfig)
    return stacked_cfg


def stacked_weight_name(name: str) -> str:
    """Return the name of a weight of the method in the stacked model."""
    return name.replace("backbone.", "backbone.then.", 1) if name.startswith("backbone.") else name
