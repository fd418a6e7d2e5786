"""What both sides of a whole training are given: weights, images, order and views, all made from names by a hash.

Files stay small this way: a vector holds the numbers of a case and what came out, and no input.
"""

import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from lightning import Callback, Trainer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from deepclust.batch import Draws, ImageBatch, TrainBatch
from deepclust.config.build import build
from deepclust.datasets.datamodule import ImageDataModule
from deepclust.methods.base import ClusteringMethod
from tests.conftest import compose_train

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


def make_hashed_values(n: int, salt: int) -> Tensor:
    """Return the `n` pseudo-random numbers from -0.5 to 0.5, in float64, with which the vectors were made."""
    h = (np.arange(n, dtype=np.uint64) * 2654435761 + salt * 97) & 0xFFFFFFFF
    for factor, shift in ((1, 15), (2246822519, 13), (3266489917, 16)):
        h = h * np.uint64(factor) & np.uint64(0xFFFFFFFF)
        h ^= h >> np.uint64(shift)
    return torch.from_numpy(h.astype(np.float64) / 2**32 - 0.5)


def hashed(name: str, *shape: int) -> Tensor:
    """Return hashed values of this shape; the salt is the CRC-32 of the name."""
    return make_hashed_values(int(np.prod(shape)), zlib.crc32(name.encode())).reshape(shape)


# Weights --------------------------------------------------------------------------------------------------------------


def make_weight(name: str, shape: torch.Size, *, is_norm: bool) -> Tensor:
    """Return the initial weight: of the usual size for a matrix, near 1 for a norm, near 0 for a bias."""
    values = hashed(f"weight {name}", *shape)
    if len(shape) > 1:
        return values * (24 / np.prod(shape[1:])) ** 0.5
    return 1 + 0.2 * values if is_norm else 0.2 * values


@torch.no_grad()
def set_weights(module: nn.Module, names: dict[str, str] | None = None, skip: tuple[str, ...] = ()) -> None:
    """Give every parameter of `module` the initial weight of its name.

    `names` maps prefixes of names in `module` to those by which weights are known on both sides; parameters under none
    of them, and under those in `skip`, stay as they are.
    """
    norms = {id(layer.weight) for layer in module.modules() if isinstance(layer, NORMS)}
    for name, parameter in module.named_parameters():
        common_name = rename(name, names)
        if common_name is not None and not name.startswith(skip):
            parameter.copy_(make_weight(common_name, parameter.shape, is_norm=id(parameter) in norms))


def rename(name: str, names: dict[str, str] | None) -> str | None:
    """Return the name of a weight on both sides; None if it has none."""
    if names is None:
        return name
    matches = [prefix for prefix in names if name.startswith(prefix)]
    return names[matches[0]] + name.removeprefix(matches[0]) if matches else None


def read_weights(module: nn.Module, names: dict[str, str] | None = None, skip: tuple[str, ...] = ()) -> dict:
    """Return the parameters and floating-point buffers of `module` as weight.NAME, named as in `set_weights`."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        f"weight.{common_name}": tensor.detach().clone()
        for name, tensor in tensors.items()
        if (common_name := rename(name, names)) is not None and not name.startswith(skip) and tensor.is_floating_point()
    }


class SmallResNet(nn.Module):
    """A ResNet of two blocks, whose weights have the names of ResNet-18's."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
        layers: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            "bn1": nn.BatchNorm2d(8),
            "relu": nn.ReLU(),
            "maxpool": nn.MaxPool2d(2),
            "layer1": nn.Sequential(BasicBlock(8, 8)),
            "layer2": nn.Sequential(BasicBlock(8, 16, stride=2, downsample=shortcut)),
            "avgpool": nn.AdaptiveAvgPool2d(1),
            "flatten": nn.Flatten(),
        }
        self.network = nn.Sequential(OrderedDict(layers))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


# Images, their order and views ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class GivenImages:
    """The images of a case, (M, 3, S, S) in float64: a pattern for each of K kinds, and something of their own.

    `views` are the images with more of the same noise; with `view_noise` 0 they are the images.
    """

    num_images: int
    num_kinds: int
    size: int
    batch_size: int
    drop_last: bool
    view_noise: float
    channels: int = 3

    def __post_init__(self) -> None:
        shape = (self.channels, self.size, self.size)
        self.shape = (self.size, self.size, self.channels)  # as an `ImageSource` has it
        self.kinds = torch.arange(self.num_images) % self.num_kinds
        self.images = 2 * hashed("kinds", self.num_kinds, *shape)[self.kinds] + hashed(
            "images", self.num_images, *shape
        )

    def __len__(self) -> int:
        return self.num_images

    def read(self, indices: np.ndarray) -> Tensor:
        return self.images[torch.as_tensor(indices)]

    def order(self, epoch: int) -> Tensor:
        """Return the order (M,) of the images in an epoch."""
        return hashed(f"order of epoch {epoch}", self.num_images).argsort(stable=True)

    def batches(self, epoch: int) -> list[Tensor]:
        """Return the indices of each batch of an epoch."""
        batches = list(self.order(epoch).split(self.batch_size))
        return batches[:-1] if self.drop_last and len(batches[-1]) < self.batch_size else batches

    def view(self, indices: Tensor, kind: str, epoch: int, batch: int) -> Tensor:
        """Return a view (N, 3, S, S) of images; `kind` tells views of a batch from each other: "view 0" and so on."""
        images = self.images[indices]
        return images + self.view_noise * hashed(f"{kind} of batch {batch} of epoch {epoch}", *images.shape)


class GivenDraws(Draws):
    """Draws whose noise is hashed; generators are those of every run."""

    def normal_like(self, values: Tensor, purpose: str) -> Tensor:
        _, epoch, batch = self.key
        return hashed(f"{purpose} of batch {batch} of epoch {epoch}", *values.shape).to(values.dtype)


class CleanViews:
    """Stands in for the views where only the clean pass asks for them."""

    def clean(self, images: Tensor) -> Tensor:
        return images


class GivenDataModule(ImageDataModule):
    """The data module of every run, with the order and the views of a case."""

    def __init__(self, images: GivenImages, num_views: int, seed: int = 0) -> None:
        super().__init__(
            fit=images,  # type: ignore[arg-type]
            extra=None,
            views=CleanViews(),  # type: ignore[arg-type]
            batch_size=images.batch_size,
            clean_batch_size=images.num_images,
            drop_last=images.drop_last,
            resident_bytes=0,
            seed=seed,
        )
        self.images, self.num_views = images, num_views

    def draw_epoch_batches(self, epoch: int, weights: Tensor | None, *, shuffle: bool = True) -> list[np.ndarray]:
        return self.split_into_batches(self.images.order(epoch), self.count_batches(self.fit))

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> TrainBatch:
        _, epoch, number = batch.draws.key
        draws = GivenDraws(batch.draws.key, batch.draws.first_row, batch.draws.global_batch_size)
        return TrainBatch(
            tuple(self.images.view(batch.indices, f"view {v}", epoch, number) for v in range(self.num_views)),
            batch.indices,
            draws,
            companion_views=tuple(
                self.images.view(companions, f"companion {c}", epoch, number)
                for c, companions in enumerate(batch.companions.T)
            ),
            companions=batch.companions,
        )


# Our side -------------------------------------------------------------------------------------------------------------


def make_images(case: dict) -> GivenImages:
    """Return the images of a case."""
    return GivenImages(
        num_images=case["M"],
        num_kinds=case["K"],
        size=case["size"],
        batch_size=case["B"],
        drop_last=case["drop_last"],
        view_noise=case["view_noise"],
    )


def build_method(case: dict) -> tuple[ClusteringMethod, dict]:
    """Return the method of the case's overrides, in float64, and its whole configuration."""
    cfg = compose_train(
        *case["overrides"],
        "hardware=cpu",
        f"dataset.num_images={case['M']}",
        f"dataset.num_classes={case['K']}",
        f"dataset.num_clusters={case['K']}",
        f"dataset.image_size={case['size']}",
        "dataset.channels=3",
        f"batch_size={case['B']}",
        f"drop_last={case['drop_last']}".lower(),
        f"trainer.max_epochs={case['epochs']}",
    )
    torch.manual_seed(0)
    given = {"backbone": SmallResNet()} if case.get("backbone") == "SmallResNet" else {}
    return build(cfg.method, **given).double(), cfg


class LossRecorder(Callback):
    """Records the loss of each batch."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach().clone())


def fit(method: ClusteringMethod, cfg, case: dict, *, num_views: int = 2) -> dict[str, Tensor]:
    """Train the method for the epochs of the case; return the loss of each batch, as `loss`."""
    recorder, num_accumulated = LossRecorder(), cfg.trainer.get("accumulate_grad_batches", 1)
    trainer = Trainer(
        max_epochs=case["epochs"],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=num_accumulated,
        callbacks=[recorder],
    )
    trainer.fit(method, GivenDataModule(make_images(case), num_views))
    return {"loss": torch.stack(recorder.losses)}


# What is compared -----------------------------------------------------------------------------------------------------


def summarize(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a result as it is stored: of each weight its sum, its length and its product with hashed values."""
    return {
        name: torch.stack([values.sum(), values.norm(), (values.flatten() * hashed(name, values.numel())).sum()])
        if name.startswith("weight.")
        else values
        for name, values in result.items()
    }


def make_adapter(train_ours: Callable[[dict], dict]) -> Callable[[dict, dict], dict]:
    """Return the adapter of the quantity `whole_training`, whose cases have numbers but no inputs."""
    return lambda params, inputs: summarize(train_ours(params))
