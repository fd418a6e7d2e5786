"""A network of your own as a backbone: any module from images to features."""

from typing import Any

import torch
from torch import Tensor, nn

from deepclust.errors import InputError
from deepclust.number_types import PositiveInt


class OwnNetwork(nn.Module):
    """(N, channels, H, W) -> (N, num_features): what `network` returns, flattened.

    `num_features` is an attribute of the network where it has one; else the network is tried on black images.

    Args:
        network: the network.
        in_channels: channels of the images.
        image_size: their height and width in pixels.
        name: what it was, for the record, where it was handed over as an object.
        sha256: likewise, the checksum of its initial weights.

    Raises:
        InputError: if the network cannot take such images, or does not return one tensor with a row for each.
    """

    def __init__(
        self,
        *,
        network: Any,
        in_channels: PositiveInt,
        image_size: PositiveInt,
        name: str | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise InputError(
                f"the backbone is a {type(network).__name__}",
                expected="a torch.nn.Module from images (N, channels, H, W) to features (N, D)",
                do="hand over such a module, or a class or function that makes one",
            )
        self.network = network
        known = getattr(network, "num_features", None)
        self.num_features = known if isinstance(known, int) else self.count_features(in_channels, image_size)

    @torch.no_grad()
    def count_features(self, in_channels: int, image_size: int) -> int:
        """Return the number of features of each of two black images."""
        was_training = {module: module.training for module in self.network.modules()}
        images = torch.zeros(2, in_channels, image_size, image_size)
        tensor = next(self.network.parameters(), images)
        try:
            features = self.network.eval()(images.to(tensor.device))
        except Exception as error:
            raise InputError(
                f"the backbone {type(self.network).__name__} fails on images of {in_channels} x {image_size} x "
                f"{image_size}: {' '.join(str(error).split())[:300] or type(error).__name__}",
                expected="a network from images (N, channels, H, W) to features (N, D)",
                do="correct it, or set dataset.image_size and dataset.channels to what it takes",
            ) from error
        finally:
            for module, mode in was_training.items():
                module.training = mode
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != 2:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(
                f"the backbone {type(self.network).__name__} returns {found} for 2 images",
                expected="features (2, D)",
                do="let its forward return one tensor with a row for each image",
            )
        return features.flatten(1).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).flatten(1)
