"""A backbone without a network: the features are the vectors or pixels themselves."""

from torch import Tensor, nn

from deepclust.number_types import PositiveInt


class Identity(nn.Module):
    """(N, channels, H, W) -> (N, num_features), the same numbers; num_features = channels * H * W."""

    def __init__(self, *, in_channels: PositiveInt, image_size: PositiveInt) -> None:
        super().__init__()
        self.num_features = in_channels * image_size**2

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)
