"""Networks without convolutions, for vectors and small images."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from deepclust.number_types import PositiveInt


class Mlp(nn.Module):
    """Linear layers with ReLU between them; (N, channels, image_size, image_size) -> (N, num_features).

    Weights are initialised He-normal and biases with 0. With the smaller default of torch, LNSCC's embeddings of the
    digits started so close together that some seeds split a class.
    """

    def __init__(
        self,
        *,
        channels: PositiveInt,
        image_size: PositiveInt,
        hidden_sizes: Sequence[PositiveInt],
        num_features: PositiveInt,
    ) -> None:
        super().__init__()
        sizes = [channels * image_size**2, *hidden_sizes]
        hidden_layers = [layer for pair in pairwise(sizes) for layer in self.make_hidden_layers(*pair)]
        self.layers = nn.Sequential(nn.Flatten(), *hidden_layers, nn.Linear(sizes[-1], num_features))
        self.num_features = num_features
        initialize_he_normal(self)

    @staticmethod
    def make_hidden_layers(in_features: int, out_features: int) -> list[nn.Module]:
        """Return what stands for one of the hidden sizes, `out_features`."""
        return [nn.Linear(in_features, out_features), nn.ReLU(inplace=True)]

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ResidualMlp(Mlp):
    """LNSCC's encoder (Ma and Kim 2022); (N, channels, image_size, image_size) -> (N, num_features).

    For each hidden size, there are a linear layer, a leaky ReLU of slope 0.1, layer normalisation and a residual block
    of twice the width. A linear layer follows at the end.
    """

    @staticmethod
    def make_hidden_layers(in_features: int, out_features: int) -> list[nn.Module]:
        linear = nn.Linear(in_features, out_features)
        return [linear, nn.LeakyReLU(0.1), nn.LayerNorm(out_features), ResidualBlock(out_features)]


class ResidualBlock(nn.Module):
    """The sum of rows (N, size) and two linear layers of them, followed by a leaky ReLU of slope 0.1."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.Linear(size, 2 * size),
            nn.LeakyReLU(0.1),
            nn.LayerNorm(2 * size),
            nn.Linear(2 * size, size),
            nn.LayerNorm(size),
        )
        self.activation = nn.LeakyReLU(0.1)

    def forward(self, rows: Tensor) -> Tensor:
        return self.activation(rows + self.inside(rows))


def initialize_he_normal(network: nn.Module) -> None:
    """Initialise the weights of all linear layers He-normal and their biases with 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="leaky_relu")
            nn.init.zeros_(layer.bias)
