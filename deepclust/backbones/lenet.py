"""A small network in the manner of LeNet-5 (LeCun et al., 1998): convolutions without padding, and pooling."""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import MinLen
from torch import Tensor, nn

from deepclust.errors import InputError
from deepclust.number_types import PositiveInt


class LeNet(nn.Module):
    """Convolutions without padding, with batch normalisation and ReLU; images (N, channels, H, W) -> (N, num_features).

    A 2x2 max-pool follows the layers whose numbers (from 1) are in `pool_after`. The last maps are flattened, so that
    num_features depends on `image_size` = H = W.

    Raises:
        InputError: if nothing is left of images of this size.
    """

    def __init__(
        self,
        *,
        channels: PositiveInt,
        image_size: PositiveInt,
        widths: Annotated[Sequence[PositiveInt], MinLen(1)],
        kernel_size: PositiveInt,
        pool_after: Sequence[PositiveInt],
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        side = image_size
        for number, width in enumerate(widths, start=1):
            layers += [nn.Conv2d(channels, width, kernel_size), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            side -= kernel_size - 1
            if number in pool_after:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            channels = width
        if side < 1:
            raise InputError(
                f"the images have {image_size} x {image_size} pixels, of which the convolutions of LeNet leave nothing",
                expected="larger images (16 pixels or more for the layers of backbone=lenet)",
                do="choose backbone=conv_small, or a larger dataset.image_size",
            )
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.num_features = channels * side**2

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
