"""`deepclust cluster images=DIR num_clusters=K`: a folder of images to clusters, pictures and a model.

What exists, in order: a network that turns images into features (`network.py`), the features, kept
(`deepclust features`), clusters of the features (`deepclust train dataset=features`), each by several seeds; and last
one run folder in which network and clusters are one model. Every step leaves a folder of its own in there, and what is
complete is not made again:

    data/               the images, decoded
    network-KEY/        a network of our own: a run of `deepclust train`
    features/           the features: a data set for `deepclust train dataset=features dataset.path=...`
    clusters/KEY/       a run for each rule, number of clusters and seed; lnscc's first stage knows of no number
    report.html, assignments.csv, results.json, checkpoints/last.ckpt   the result of the latest call
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from deepclust.clustering.number import Estimate
from deepclust.config import build, plain
from deepclust.datasets.source import ImageSet
from deepclust.errors import InputError
from deepclust.network import (
    choose_network,
    composed,
    describe_images,
    describe_network,
    features_key,
    keep_features,
    key,
    run_part,
    train_network,
)
from deepclust.run_folder import (
    ASSIGNMENTS,
    CHECKPOINT,
    command_line,
    load_checkpoint,
    load_method,
    pick_device,
    read_results,
    write_assignments,
    write_results,
)
from deepclust.show import judge_pixels, show_run, write_run_report
from deepclust.train import count_clusters, make_datamodule, make_judge
from deepclust.trust import trust

log = logging.getLogger(__name__)

METRICS = "metrics.csv"


def main(cfg: DictConfig) -> dict[str, Any]:
    """The clusters in Hydra's folder."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    results = cluster(cfg, folder)
    show_run(results, folder)
    print(f"{results['trust']['says']}; whether they are what you look for, only a look at report.html tells")
    return results


@contextmanager
def each_said_once(name: str) -> Iterator[None]:
    """No message of that logger twice: the steps open the same images again, and the files that are broken stay so."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        new = record.getMessage() not in said
        said.add(record.getMessage())
        return new

    logger = logging.getLogger(name)
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


@each_said_once("deepclust.datasets.folder")
def cluster(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Fill the run folder; the content of results.json."""
    root = Path(os.path.abspath(Path(cfg.images).expanduser()))
    check_wanted(cfg, folder, root)
    network = choose_network(cfg)
    log.info(network.says)
    dataset = describe_images(cfg, network, root, folder)
    try:
        images: ImageSet = build(dataset["source"])
    except InputError as error:  # about the key of `train`
        cure = error.do.replace("dataset.path", "images")
        raise InputError(error.what, expected=error.expected, do=cure) from error
    check_enough(cfg, images)

    place = None if network.trained else train_network(cfg, network, dataset, images, folder)
    source = describe_network(cfg, network, dataset, images, place)
    kept = keep_features(cfg, source, place, folder)
    number, estimate = cfg.num_clusters, None
    if number == "auto":
        number, estimate = tell_number(cfg, kept)
        log.info(estimate.says())

    rule = cfg.rule or ("lnscc" if len(images.fit) >= 10 * number else "kmeans")
    seeds = range(cfg.seed, cfg.seed + cfg.num_seeds)
    runs = {seed: clusters_of(kept, cfg, rule, number, seed, name=root.name, folder=folder) for seed in seeds}
    results = read_results(folder)
    if results is not None and (results["run"], results["trust"]["seeds"]) == (str(runs[cfg.seed]), list(seeds)):
        log.info("%s is finished already; nothing to do", folder)
        return results
    return write_model(cfg, folder, images, source, place, kept, runs, estimate)


# What is asked for


def check_wanted(cfg: DictConfig, folder: Path, root: Path) -> None:
    """Refuse what cannot be done before anything is begun.

    Raises:
        InputError: naming the key to change.
    """
    if cfg.num_clusters != "auto" and not (isinstance(cfg.num_clusters, int) and cfg.num_clusters > 0):
        raise InputError(
            f"num_clusters is {cfg.num_clusters}", expected="a whole number above 0, or auto", do="set num_clusters"
        )
    if cfg.rule not in (None, "lnscc", "kmeans"):
        raise InputError(f"rule is {cfg.rule}", expected="lnscc, kmeans or null", do="set rule")
    if cfg.num_seeds < 1:
        raise InputError(f"num_seeds is {cfg.num_seeds}", expected="1 or more", do="set num_seeds")
    if not root.is_dir():
        raise InputError(
            f"{root} is {'no folder' if root.exists() else 'missing'}",
            expected="a folder of images",
            do="set images=DIR",
        )
    before = read_results(folder)
    if before is not None and before.get("images") != str(root):
        raise InputError(
            f"{folder} holds the clusters of {before.get('images', 'something else')}",
            expected=f"those of {root}, or an empty folder",
            do="set hydra.run.dir=DIR",
        )


def check_enough(cfg: DictConfig, images: ImageSet) -> None:
    """Raise InputError where there are fewer images than clusters, or a single one."""
    least = 20 if cfg.num_clusters == "auto" else max(2, cfg.num_clusters)
    if len(images.fit) < least:
        smaller = "" if cfg.num_clusters == "auto" else "smaller "
        raise InputError(
            f"{cfg.images} holds {len(images.fit)} images that can be read, and num_clusters is {cfg.num_clusters}",
            expected=f"{least} images at least",
            do="add images" if len(images.fit) < 2 else f"set num_clusters to a {smaller}number, or add images",
        )


# The clusters


def tell_number(cfg: DictConfig, kept: Path) -> tuple[int, Estimate]:
    """How many clusters the features hold; told once for these features and this seed."""
    vectors = composed(cfg, "train", "dataset=features")
    vectors.dataset.path = str(kept)
    file, made_of = kept / "number.json", [features_key(kept), cfg.seed]
    said = json.loads(file.read_text()) if file.is_file() else {}
    if said.get("made_of") == made_of:
        curves = {name: [(k, value) for k, value in curve] for name, curve in said["curves"].items()}
        estimate = Estimate(said["num_clusters"], said["named"], curves)
    else:
        log.info("telling the number of clusters from the features")
        estimate = count_clusters(build(vectors.dataset.source), seed=cfg.seed)
        file.write_text(json.dumps(asdict(estimate) | {"made_of": made_of}))
    return estimate.require_several("num_clusters"), estimate


def clusters_of(kept: Path, cfg: DictConfig, rule: str, number: int, seed: int, *, name: str, folder: Path) -> Path:
    """The run folder of one clustering of the features."""
    made_of = [features_key(kept), rule, number, seed, plain(cfg.evaluation), cfg.min_steps, cfg.max_steps]
    place = folder / "clusters" / f"{rule}-{number}-seed{seed}-{key(made_of)}"
    if read_results(place) is not None:
        return place
    one = on_features(kept, cfg, rule, number, seed, name=name)
    one.evaluation = cfg.evaluation
    if rule == "lnscc":
        one.start = str(embedding_of(kept, cfg, seed, name=name, folder=folder))
        before, one.method.centres_after_epochs = one.method.centres_after_epochs, 0
        one.method.clustering_after_epochs -= before
        one.trainer.max_epochs = max(1, one.trainer.max_epochs - before)
    log.info("%d clusters by %s, seed %d", number, rule, seed)
    run_part(one, place)
    return place


def embedding_of(kept: Path, cfg: DictConfig, seed: int, *, name: str, folder: Path) -> Path:
    """The run folder of LNSCC up to where it sets centres: the same whatever the number of clusters."""
    made_of = [features_key(kept), seed, cfg.min_steps, cfg.max_steps]
    place = folder / "clusters" / f"embedding-seed{seed}-{key(made_of)}"
    if read_results(place) is None:
        one = on_features(kept, cfg, "lnscc", 1, seed, name=name)
        one.trainer.max_epochs = one.method.centres_after_epochs
        log.info("embedding, seed %d", seed)
        run_part(one, place)
    return place


def on_features(kept: Path, cfg: DictConfig, rule: str, number: int, seed: int, *, name: str) -> DictConfig:
    """The configuration (train's) of that rule on the features."""
    one = composed(cfg, "train", f"method={rule}", "dataset=features", "~callbacks.evaluation")
    one.dataset.path, one.dataset.name = str(kept), name
    one.dataset.num_clusters = number
    one.seed = seed
    one.report.map_points = 0  # the result has one
    one.names.method, one.names.backbone = rule, one.names.backbone or "identity"
    count = len(build(one.dataset.source).fit)
    one.batch_size = min(one.batch_size, count)
    if rule == "lnscc":
        steps = count // one.batch_size  # in an epoch
        # Long enough for a few images and not too long for many; the parts are those of conf/method/lnscc.yaml.
        wanted = min(max(one.trainer.max_epochs * steps, cfg.min_steps), cfg.max_steps) / steps
        longer = wanted / one.trainer.max_epochs
        one.trainer.max_epochs = max(1, round(wanted))
        for stage in ("centres_after_epochs", "clustering_after_epochs"):
            one.method[stage] = max(1, round(one.method[stage] * longer))
        one.method.backbone.num_features = 32  # not by the number of clusters
        if count < 5000:
            one.method.backbone.hidden_sizes = [256, 128]  # as on the digits
    return one


# The result


def write_model(
    cfg: DictConfig,
    folder: Path,
    images: ImageSet,
    source: DictConfig,
    place: Path | None,
    kept: Path,
    runs: dict[int, Path],
    estimate: Estimate | None,
) -> dict[str, Any]:
    """Make the run folder one in which network and clusters are one model; the content of results.json."""
    first = runs[cfg.seed]
    checkpoint = load_checkpoint(first)
    vectors_cfg, method = load_method(checkpoint)
    vectors_cfg.dataset.source.path = str(kept)  # the folder may have been moved since
    vectors: ImageSet = build(vectors_cfg.dataset.source)
    judge = make_judge(vectors_cfg, vectors)
    judgement = judge(method.to(pick_device(cfg.hardware.accelerator)), make_datamodule(vectors_cfg, vectors))

    network = build(source.backbone) if place is None else load_method(load_checkpoint(place))[1].backbone
    whole = stack(source, vectors_cfg)
    whole.report, whole.evaluation = cfg.report, cfg.evaluation
    model = build(whole.method)
    model.load_state_dict(
        {f"backbone.first.{name}": value for name, value in network.state_dict().items()}
        | {rename(name): value for name, value in checkpoint["state_dict"].items()}
    )
    file = folder / CHECKPOINT
    file.parent.mkdir(exist_ok=True)
    beside = file.with_suffix(".writing")
    torch.save({"state_dict": model.state_dict(), "config": plain(whole), **judgement.rule}, beside)
    beside.replace(file)

    results = (read_results(first) or {}) | {
        "backbone": whole.names.backbone,
        "command": command_line(),
        "images": whole.dataset.path,
        "run": str(first),
        "trust": trust(cfg, vectors, judgement.health, runs, own_network=place is not None),
    }
    results.pop("baseline", None)  # the features'
    if (pixels := judge_pixels(images, judge, max_values=vectors_cfg.pixel_baseline_max_values)) is not None:
        results["baseline"] = {"kmeans_on_pixels": pixels}
    if place is not None:
        results["timing"]["earlier_seconds"] += (read_results(place) or {})["timing"]["train_seconds"]
    if estimate is not None:
        results["number"] = asdict(estimate) | {"says": estimate.says()}
    if (first / METRICS).is_file():
        shutil.copy(first / METRICS, folder / METRICS)
    write_assignments(
        folder / ASSIGNMENTS, judgement.assignments, judgement.confidence, labels=images.labels, paths=images.paths
    )
    # On the map of lnscc's own features clusters are apart, whatever the images: it trains them to be.
    rows = vectors.fit.read(np.arange(len(vectors.fit))).flatten(1)
    write_run_report(folder, results, replace(judgement, features=rows), images, whole)
    write_results(folder, results)
    return results


def stack(source: DictConfig, vectors: DictConfig) -> DictConfig:
    """The configuration of the method of `vectors` on images: the network of `source` in front of its own."""
    first, whole = plain(source)["backbone"], plain(source)
    # The checkpoint holds the weights: none are read or fetched when the model is built again.
    first |= {name: none for name, none in (("weights", None), ("pretrained", False)) if name in first}
    method = plain(vectors)["method"]
    method["backbone"] = {
        "_target_": "deepclust.backbones.stacked.Stacked",
        "first": first,
        "then": method["backbone"],
    }
    whole |= {name: plain(vectors)[name] for name in ("batch_size", "drop_last", "seed", "trainer", "view_names")}
    whole |= {"method": method, "backbone": first}
    whole["multi_view"] |= {"names": whole["view_names"]}
    whole["dataset"]["num_clusters"] = vectors.dataset.num_clusters
    whole["names"]["method"] = vectors.names.method
    made = OmegaConf.create(whole)
    assert isinstance(made, DictConfig)
    return made


def rename(name: str) -> str:
    """A weight's name in the stacked model."""
    return name.replace("backbone.", "backbone.then.", 1) if name.startswith("backbone.") else name
