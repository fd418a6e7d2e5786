"""`deepclust cluster images=DIR num_clusters=K`: a folder of images to clusters, pictures and a model.

What exists, in order: a network that turns images into features (`choose_network`, `train_network`), the features, kept
(`deepclust features`), clusters of the features (`deepclust train dataset=features`), each by several seeds; and last
one run folder in which network and clusters are one model. Every step leaves a folder of its own in there, and what is
complete is not made again:

    data/               the images, decoded
    network-KEY/        a network of our own: a run of `deepclust train`
    features/           the features: a data set for `deepclust train dataset=features dataset.path=...`
    clusters/KEY/       a run for each rule, number of clusters and seed
    report.html, assignments.csv, results.json, checkpoints/last.ckpt   the result of the latest call
"""

import csv
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from sklearn.metrics import adjusted_rand_score

from deepclust import features as features_verb
from deepclust.backbones.pretrained import ENDINGS, cached_resnet, read_state
from deepclust.clustering.number import Estimate
from deepclust.clustering.restarts import dealt_kmeans
from deepclust.config import build, plain
from deepclust.datasets.source import ImageSet
from deepclust.errors import InputError
from deepclust.run_folder import (
    ASSIGNMENTS,
    CHECKPOINT,
    command_line,
    load_checkpoint,
    load_method,
    pick_device,
    read_results,
    recipe,
    write_assignments,
    write_results,
)
from deepclust.show import judge_pixels, show_run, write_run_report
from deepclust.train import complete_dataset, count_clusters, make_datamodule, make_judge, run

log = logging.getLogger(__name__)

KEPT = 96  # pixels at least in which images are kept, so that the report shows something
PRETRAINED, OWN = 224, 32  # pixels that networks see
LEVELS = {0.8: "well", 0.5: "fairly"}  # mean ARI between seeds from which on; below: little
DOWN = {"well": "fairly", "fairly": "little", "little": "little"}
GIANT = 4.0  # times the mean size
METRICS = "metrics.csv"


def main(cfg: DictConfig) -> dict[str, Any]:
    """The clusters in Hydra's folder."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    results = cluster(cfg, folder)
    show_run(results, folder)
    print(results["trust"]["says"])
    return results


def cluster(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Fill the run folder; the content of results.json."""
    root = Path(os.path.abspath(Path(cfg.images).expanduser()))
    check_wanted(cfg, folder, root)
    network = choose_network(cfg)
    log.info(network.says)
    dataset = describe_images(cfg, network, root, folder)
    images: ImageSet = build(dataset["source"])
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
    return write_model(cfg, folder, images, source, place, runs, estimate)


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
        raise InputError(
            f"{cfg.images} holds {len(images.fit)} images that can be read, and num_clusters is {cfg.num_clusters}",
            expected=f"{least} images at least",
            do="set num_clusters to a smaller number, or add images",
        )


# The network


@dataclass(frozen=True)
class Network:
    """What turns images into features."""

    name: str
    backbone: DictConfig | None  # null: the small network of conf/cluster.yaml
    trained: bool  # by others, before
    image_size: int
    scale: dict[str, list[float]]  # mean and std, where the network asks for its own
    says: str


def choose_network(cfg: DictConfig) -> Network:
    """The first that there is: the one asked for, one whose weights are at hand or may be fetched, one of our own."""
    backbone = cfg.get("backbone")
    if backbone is not None:
        if str(backbone.get("weights")).endswith(ENDINGS):
            read_state(backbone.weights)  # what is wrong with the file is said now, not after the images are decoded
        name = backbone.get("model_name") or f"{backbone._target_.rpartition('.')[2]}{backbone.get('depth', '')}"
        trained = bool(backbone.get("weights") or backbone.get("pretrained"))
        size, scale = preferred(backbone) if trained else (OWN, {})
        says = "with weights, as asked for" if trained else "as asked for, trained on these images without labels"
        return Network(name.lower(), backbone, trained, size, scale, f"features: {name.lower()} {says}")
    found = cached_resnet() or ((18, "IMAGENET1K_V1") if cfg.download else None)
    if found is not None:
        depth, weights = found
        composed = compose("train", overrides=[f"backbone=resnet{depth}", f"backbone.weights={weights}"]).backbone
        why = "whose weights are on this machine" if cached_resnet() else "whose weights are fetched"
        says = f"features: resnet{depth}, {why} (trained on ImageNet with its labels)"
        return Network(f"resnet{depth}", composed, True, PRETRAINED, {}, says)
    says = (
        "features: a small network trained on these images without labels, for no weights are on this machine "
        "(better ones: download=true, or backbone=resnet18 backbone.weights=FILE)"
    )
    return Network("conv_small", None, False, OWN, {}, says)


def preferred(backbone: DictConfig) -> tuple[int, dict[str, list[float]]]:
    """The image size that a pretrained network wants, and mean and std where they are not the usual ones."""
    if "model_name" not in backbone:
        return PRETRAINED, {}
    from timm.models import get_pretrained_cfg

    wanted = get_pretrained_cfg(backbone.model_name)
    if wanted is None:
        return PRETRAINED, {}
    return wanted.input_size[-1], {"mean": list(wanted.mean), "std": list(wanted.std)}


def describe_images(cfg: DictConfig, network: Network, root: Path, folder: Path) -> dict[str, Any]:
    """The section `dataset` for the images as that network wants them."""
    dataset = plain(cfg)["dataset"] | network.scale
    size = dataset["image_size"] or network.image_size
    kept = dataset["source"]["image_size"] or max(size, KEPT)
    stem = dataset["stem"] or (
        "imagenet" if network.trained or size >= 128 else "cifar" if size <= 32 else "cifar_pool"
    )
    source = dataset["source"] | {"path": str(root), "image_size": kept, "data_dir": cfg.data_dir or f"{folder}/data"}
    return dataset | {
        "name": root.name,
        "path": str(root),
        "image_size": size,
        "stem": stem,
        "source": source,
        "num_clusters": 1,  # a network knows of none
    }


def composed(cfg: DictConfig, verb: str, *overrides: str, dataset: dict[str, Any] | None = None) -> DictConfig:
    """The configuration of another verb, on the hardware and with the seed of this one."""
    made = compose(verb, overrides=list(overrides))
    made.seed = cfg.seed
    if verb == "train":
        made.hardware = cfg.hardware
    if dataset is not None:
        with open_dict(made):
            made.dataset = dataset
    return made


def train_network(cfg: DictConfig, network: Network, dataset: dict[str, Any], images: ImageSet, folder: Path) -> Path:
    """The run folder of a network trained on these images and no others."""
    chosen = ["method=scan_pretext", "views=simclr", "backbone=conv_small", "dataset=folder", "~callbacks.evaluation"]
    unlabelled = dataset | {"labelled": False, "source": dataset["source"] | {"labelled": False}}
    own = composed(cfg, "train", *chosen, dataset=unlabelled)
    changes = cfg.network.copy()
    if network.backbone is not None:
        own.backbone = network.backbone
        with open_dict(changes):
            del changes.backbone
    own.merge_with(changes)
    count = len(images.fit)
    batch = min(own.batch_size, count)
    own.method.optimizer.lr *= batch / own.batch_size
    own.batch_size = batch
    own.trainer.max_epochs = own.trainer.max_epochs or max(cfg.min_epochs, round(cfg.images_seen / count))
    own.report.map_points = 0
    own.names.method, own.names.backbone = "scan_pretext", network.name
    made_of = recipe(plain(own)) | {"epochs": own.trainer.max_epochs, "images": features_verb.fingerprint(images.fit)}
    place = folder / f"network-{key(made_of)}"
    if read_results(place) is None:
        log.info("training it for %d epochs of %d images", own.trainer.max_epochs, count)
        place.mkdir(parents=True, exist_ok=True)
        run(own, place)
    return place


def describe_network(
    cfg: DictConfig, network: Network, dataset: dict[str, Any], images: ImageSet, place: Path | None
) -> DictConfig:
    """The configuration (train's) of the network on these images; `place` is its run folder where it is our own."""
    if place is None:
        whole = composed(cfg, "train", "dataset=folder", "views=propos", "backbone=identity", dataset=dataset)
        whole.backbone = network.backbone
        whole.names.backbone = network.name
    else:
        whole = OmegaConf.create(load_checkpoint(place)["config"])
        whole.dataset = dataset
    complete_dataset(whole, images)
    return whole


def keep_features(cfg: DictConfig, source: DictConfig, place: Path | None, folder: Path) -> Path:
    """The folder with the features of all images."""
    if place is None:
        asked = composed(cfg, "features", "views=propos", "backbone=identity", dataset=plain(source)["dataset"])
        asked.backbone = source.backbone
    else:
        asked = composed(cfg, "features", "run=place", dataset=plain(source)["dataset"])
        asked.run = str(place)
    asked.output = str(folder / "features")
    asked.batch_size = cfg.batch_size
    asked.accelerator = cfg.hardware.accelerator
    return features_verb.main(asked)


def key(made_of: Any) -> str:
    """A name for what is made of that."""
    return sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:8]


def features_key(kept: Path) -> str:
    """What the features were made of."""
    return json.loads((kept / features_verb.MADE_BY).read_text())["sha256"]


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
    made_of = [features_key(kept), rule, number, seed, plain(cfg.evaluation)]
    place = folder / "clusters" / f"{rule}-{number}-seed{seed}-{key(made_of)}"
    if read_results(place) is not None:
        return place
    one = composed(cfg, "train", f"method={rule}", "dataset=features", "~callbacks.evaluation")
    one.dataset.path, one.dataset.name = str(kept), name
    one.dataset.num_clusters = number
    one.seed = seed
    one.report.map_points = 0  # the result has one
    one.evaluation = cfg.evaluation
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
            one.method[stage] = round(one.method[stage] * longer)
        if count < 5000:
            one.method.backbone.hidden_sizes = [256, 128]  # as on the digits
    log.info("%d clusters by %s, seed %d", number, rule, seed)
    place.mkdir(parents=True, exist_ok=True)
    run(one, place)
    return place


# The result


def write_model(
    cfg: DictConfig,
    folder: Path,
    images: ImageSet,
    source: DictConfig,
    place: Path | None,
    runs: dict[int, Path],
    estimate: Estimate | None,
) -> dict[str, Any]:
    """Make the run folder one in which network and clusters are one model; the content of results.json."""
    first = runs[cfg.seed]
    checkpoint = load_checkpoint(first)
    vectors_cfg, method = load_method(checkpoint)
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
        "trust": trust(cfg, vectors, judgement.health, runs),
    }
    results.pop("baseline", None)  # the features'
    if (pixels := judge_pixels(images, judge, max_values=vectors_cfg.pixel_baseline_max_values)) is not None:
        results["baseline"] = {"kmeans_on_pixels": pixels}
    if place is not None:
        results["timing"]["earlier_seconds"] = (read_results(place) or {})["timing"]["train_seconds"]
    if estimate is not None:
        results["number"] = asdict(estimate) | {"says": estimate.says()}
    if (first / METRICS).is_file():
        shutil.copy(first / METRICS, folder / METRICS)
    write_assignments(
        folder / ASSIGNMENTS, judgement.assignments, judgement.confidence, labels=images.labels, paths=images.paths
    )
    write_run_report(folder, results, judgement, images, whole)
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
    whole |= {name: plain(vectors)[name] for name in ("batch_size", "view_names", "seed", "drop_last")}
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


def trust(cfg: DictConfig, vectors: ImageSet, health: dict[str, float], runs: dict[int, Path]) -> dict[str, Any]:
    """How far to trust the clusters: whether seeds, and plain k-means on the same features, come to the same ones.

    That is about what can be repeated. Whether it is what one was looking for, no number without labels can say.
    """
    found = {seed: read_clusters(place) for seed, place in runs.items()}
    sizes = np.bincount(found[cfg.seed])
    results = read_results(runs[cfg.seed]) or {}
    number, largest = results["num_clusters"], float(sizes.max() / sizes.sum())
    said: dict[str, Any] = {"seeds": list(runs), "empty_clusters": health["empty_clusters"], "largest_share": largest}
    giant = largest > min(0.9, GIANT / number) and number > 1
    words = []
    level = None
    if len(found) > 1:
        said["ari_between_seeds"] = mean(float(adjusted_rand_score(a, b)) for a, b in combinations(found.values(), 2))
        level = next((name for least, name in LEVELS.items() if said["ari_between_seeds"] >= least), "little")
        level = DOWN[level] if giant or health["empty_clusters"] else level
        words.append(f"{len(found)} seeds agree to {said['ari_between_seeds']:.2f} (ARI; 1 is the same)")
    if results["method"] != "kmeans":
        rows = vectors.fit.read(np.arange(len(vectors.fit))).flatten(1)
        plain_kmeans = dealt_kmeans(
            rows,
            num_clusters=number,
            metric="euclidean",
            num_restarts=cfg.evaluation.kmeans_restarts,
            max_iterations=cfg.evaluation.kmeans_max_iterations,
            tolerance=cfg.evaluation.kmeans_tolerance,
            key=(cfg.seed, "k-means beside the clusters"),
        )
        said["ari_with_kmeans"] = float(adjusted_rand_score(found[cfg.seed], plain_kmeans.assignments.cpu().numpy()))
        words.append(f"plain k-means on the same features to {said['ari_with_kmeans']:.2f}")
    empty = int(health["empty_clusters"])
    words.append(f"{empty or 'no'} cluster{'s are' if empty > 1 else ' is'} empty")
    words.append(f"the largest holds {100 * largest:.1f} % of the images{', far more than its part' if giant else ''}")
    begin = f"how far to trust the clusters: {level}; " if level else "how far to trust the clusters: "
    said["says"] = begin + ", ".join(words) + "; whether they are what you look for, see report.html"
    return said


def read_clusters(place: Path) -> np.ndarray:
    """The cluster of each image (M,) in a run folder."""
    with (place / ASSIGNMENTS).open(newline="") as file:
        return np.array([int(row["cluster"]) for row in csv.DictReader(file)])
