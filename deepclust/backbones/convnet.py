"""A small convolutional network for images of 8 to 32 pixels."""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import MinLen
from torch import Tensor, nn

from deepclust.number_types import PositiveInt


class ConvNet(nn.Module):
    """3x3 convolutions with batch normalisation and ReLU; (N, channels, H, W) -> (N, num_features).

    A 2x2 max-pool follows the layers whose numbers (from 1) are in `pool_after`. The maps are averaged over `grid` x
    `grid` cells and flattened, so that the position of a stroke is kept; num_features = widths[-1] * grid^2.
    """

    def __init__(
        self,
        *,
        in_channels: PositiveInt,
        widths: Annotated[Sequence[PositiveInt], MinLen(1)],
        pool_after: Sequence[PositiveInt],
        grid: PositiveInt,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, width in enumerate(widths, start=1):
            layers += [
                nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            if number in pool_after:
                layers.append(nn.MaxPool2d(2))
            in_channels = width
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(grid), nn.Flatten())
        self.num_features = in_channels * grid**2

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
