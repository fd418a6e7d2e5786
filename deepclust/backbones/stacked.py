"""A backbone that trains one network on the features of another, which is frozen."""

from torch import Tensor, nn


class Stacked(nn.Module):
    """(N, channels, H, W) -> (N, num_features): `then` applied to the features of `first`, which is frozen.

    `then` gets each feature vector as an image of one pixel.
    """

    def __init__(self, *, first: nn.Module, then: nn.Module) -> None:
        super().__init__()
        self.first = first.requires_grad_(False)
        self.then = then
        self.num_features = then.num_features

    def train(self, mode: bool = True) -> "Stacked":
        super().train(mode)
        self.first.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.then(self.first(images)[:, :, None, None])
