"""ResNets, also with stems for small images."""

from typing import Literal

from torch import Tensor, nn
from torchvision import models

from deepclust.backbones.pretrained import load_state_dict_except, load_torchvision_weights
from deepclust.number_types import PositiveInt


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier; (N, channels, H, W) -> (N, num_features).

    Args:
        depth: number of layers.
        stem: `imagenet` has a 7x7 convolution of stride 2 and a 3x3 max-pool; `cifar`, for images of about 32 pixels, a
            3x3 convolution of stride 1 and no pool; `cifar_pool`, for 64 and 96 pixels, a 3x3 convolution of stride 1
            and a 2x2 max-pool with padding 1.
        in_channels: channels of the images.
        weights: the name of weights of torchvision or a file. They are loaded into all layers but a replaced stem.

    Convolutions are initialised He-normal (fan-out). A replaced stem keeps torch's default, as in the code of ProPos.
    """

    def __init__(
        self,
        *,
        depth: Literal[18, 34, 50],
        stem: Literal["imagenet", "cifar", "cifar_pool"],
        in_channels: PositiveInt,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        network = getattr(models, f"resnet{depth}")()
        if weights is not None:
            state_dict = load_torchvision_weights(f"resnet{depth}", weights)
            keeps_stem = stem == "imagenet" and in_channels == 3
            load_state_dict_except(network, state_dict, prefixes=("fc.",) if keeps_stem else ("fc.", "conv1."))
        if stem != "imagenet":
            network.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
            network.maxpool = nn.MaxPool2d(2, padding=1) if stem == "cifar_pool" else nn.Identity()
        elif in_channels != 3:
            network.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.num_features: int = network.fc.in_features
        network.fc = nn.Identity()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)
