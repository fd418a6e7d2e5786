"""One network on the features of another that stays as it is."""

from torch import Tensor, nn


class Stacked(nn.Module):
    """(N, channels, H, W) -> what `then` makes of the vectors of `first`, each given to it as an image of one pixel."""

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
