"""ResNets with the stems that small images need."""

from typing import Literal

from torch import Tensor, nn
from torchvision import models

from deepclust.backbones.pretrained import load_state, torchvision_weights


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier; (N, channels, H, W) -> (N, num_features).

    Stems: `imagenet`, 7x7 stride 2 and a 3x3 max-pool; `cifar`, 3x3 stride 1 and no pool, for 32 pixels; `cifar_pool`,
    3x3 stride 1 and a 2x2 max-pool with padding 1, for 64 and 96 pixels. Convolutions start He-normal (fan-out); a
    replaced stem keeps torch's default, as in ProPos's code. `weights` (torchvision's by name, or a file) fill all but
    a replaced stem.
    """

    def __init__(
        self,
        *,
        depth: Literal[18, 34, 50],
        stem: Literal["imagenet", "cifar", "cifar_pool"],
        in_channels: int,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        network = getattr(models, f"resnet{depth}")()
        if weights is not None:
            state = torchvision_weights(f"resnet{depth}", weights)
            fits = stem == "imagenet" and in_channels == 3
            load_state(network, state, without=("fc.",) if fits else ("fc.", "conv1."))
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
